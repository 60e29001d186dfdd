"""The command of the README, with a short prompt: every act, on a real server, with real weights."""

from __future__ import annotations

import importlib
import json
import signal
import socket
import subprocess
import sys

import pytest

from kvtier.errors import KvTierError

# The package's attribute of this name is the command.
demo = importlib.import_module("kvtier.cli.demo")


def run(*arguments: str) -> str:
    command = [sys.executable, "-c", "from kvtier.cli import main; main()", "demo", *arguments]
    demo_process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = demo_process.communicate(timeout=500)
    except BaseException:
        # As a user would: it ends its server and its agents.
        demo_process.send_signal(signal.SIGINT)
        demo_process.wait()
        raise
    assert demo_process.returncode == 0
    return output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_loads_the_same_tokens_from_memory_disk_and_bucket():
    report = json.loads(run("--tokens", "256", "--json"))
    loaded = {act["name"]: act["tokens_loaded"] for act in report["acts"]}
    assert report["identical"]
    assert loaded == {
        "cold": {},
        "restarted": {"memory": 224},
        "agent_restarted": {"disk": 224},
        "new_node": {"s3": 224},
        "half_shared": {"s3": 128},
        "half_reference": {},
    }


def test_what_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ("json", "kvtier_demo_lacks_this"))
    with pytest.raises(KvTierError, match=r"needs kvtier_demo_lacks_this; run: pip install 'kvtier\[demo\]'"):
        demo.run(None, 256, json_out=True)


def test_a_bucket_that_cannot_be_used_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        file = tmp_path / "kvtier.yaml"
        file.write_text(
            "memory: {size: 64MiB}\n"
            f"s3: {{bucket: none, endpoint: 'http://127.0.0.1:{nobody.getsockname()[1]}', "
            "access_key_env: DEMO_KEY, secret_key_env: DEMO_KEY}\n"
        )
        monkeypatch.setenv("DEMO_KEY", "x")
        monkeypatch.setattr(demo, "_play", lambda *_: pytest.fail("it went on"))
        with pytest.raises(KvTierError, match="the bucket none cannot be used: s3:ListBucket: "):
            demo.run(file, 256, json_out=True)
