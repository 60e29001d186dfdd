"""Ceph's gateway on one node: a monitor, an object store in memory and radosgw, from Debian's packages.

Nothing is installed: `python -m tests.compat.rgw DIRECTORY` downloads the packages and unpacks them there,
and the tests run what they find below the directory that KVTIER_RGW names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.compat.servers import ACCESS_KEY, SECRET_KEY, Missing, Server, free_port, running, wait_for

VARIABLE = "KVTIER_RGW"
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
OSD_SECONDS = 60.0
SKIPPED = 77
"""Exit code that says that the packages cannot be had here."""
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph", "lib/x86_64-linux-gnu")


def unpack(directory: Path) -> None:
    """Download the packages and what they depend on, and unpack them below `directory`.

    Raises:
        Missing: This is no Debian, or no package archive can be reached.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Missing("radosgw comes from Debian's packages; this machine has no apt-get")
    directory = directory.resolve()
    root = directory / "root"
    if root.exists():
        return
    begun = directory / "begun"
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    wanted = _said(["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES], directory)
    names = [line.split()[1] for line in wanted.splitlines() if line.startswith("Inst ")]
    _said(["apt-get", "download", *names], directory)
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(begun)], check=True)
        package.unlink()
    if not (begun / "usr/bin/radosgw").exists():
        raise Missing("radosgw is installed in the system, or its package has another form")
    begun.rename(root)


def _said(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise Missing(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


class _Node:
    """Where a cluster of one node keeps everything, and how its programs are called."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root, self.directory = root, directory
        self.conf, self.keyring = directory / "ceph.conf", directory / "keyring"
        self.environment = {
            "LD_LIBRARY_PATH": ":".join(str(root / path) for path in _LIBRARIES),
            "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
            "CEPH_CONF": str(self.conf),
        }

    def program(self, name: str, *words: str) -> list[str]:
        return [str(self.root / "usr/bin" / name), *words]

    def call(self, name: str, *words: str) -> str:
        """Run a program that ends by itself."""
        command = self.program(name, *words)
        if name == "ceph":
            command = ["/usr/bin/python3", *command]
        done = subprocess.run(
            command,
            cwd=self.directory,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
        return done.stdout

    def configure(self, monitor: str, fsid: str) -> None:
        libraries = self.root / _LIBRARIES[0]
        self.conf.write_text(
            f"""[global]
fsid = {fsid}
mon host = {monitor}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {self.keyring}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {self.directory}
admin socket = {self.directory}/$name.asok
log file = {self.directory}/$name.log
pid file = {self.directory}/$name.pid
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
osd objectstore = memstore
memstore device bytes = 1073741824
osd data = {self.directory}/osd
mon data = {self.directory}/mon
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
"""
        )

    def make_keys(self) -> None:
        caps: dict[str, list[str]] = {
            "mon.": ["mon", "allow *"],
            "client.admin": ["mon", "allow *", "osd", "allow *", "mgr", "allow *"],
            "osd.0": ["mon", "allow profile osd", "osd", "allow *"],
            "client.rgw": ["mon", "allow rw", "osd", "allow rwx"],
        }
        for number, (name, granted) in enumerate(caps.items()):
            pairs = [
                word
                for place in range(0, len(granted), 2)
                for word in ("--cap", granted[place], granted[place + 1])
            ]
            create = ["--create-keyring"] if number == 0 else []
            self.call("ceph-authtool", str(self.keyring), *create, "--gen-key", "-n", name, *pairs)


@contextmanager
def rgw(directory: Path) -> Iterator[Server]:
    """Ceph's gateway over cephx, listening on loopback."""
    unpacked = os.environ.get(VARIABLE)
    if not unpacked:
        raise Missing("Ceph's gateway is not unpacked; run: make test-rgw")
    node = _Node(Path(unpacked).resolve() / "root", directory)
    port, monitor, fsid = free_port(), f"v1:127.0.0.1:{free_port()}", str(uuid.uuid4())
    node.configure(monitor, fsid)
    node.make_keys()
    monmap, osd_id = str(directory / "monmap"), str(uuid.uuid4())
    node.call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[{monitor}]", monmap)
    keys = ["--keyring", str(node.keyring)]
    node.call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, *keys)
    with ExitStack() as stack:
        stack.enter_context(running(node.program("ceph-mon", "-f", "-i", "a"), directory, node.environment))
        # The keys in the monitor's own file at its making: those of the others are told to it here.
        node.call("ceph", "auth", "import", "-i", str(node.keyring))
        node.call("ceph", "osd", "new", osd_id, "0")
        (directory / "osd").mkdir()
        node.call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd_id)
        stack.enter_context(running(node.program("ceph-osd", "-f", "-i", "0"), directory, node.environment))
        _wait_for_osd(node)
        user = [
            "--uid=kvtier",
            "--display-name=kvtier",
            f"--access-key={ACCESS_KEY}",
            f"--secret={SECRET_KEY}",
        ]
        node.call("radosgw-admin", "-n", "client.rgw", "user", "create", *user)
        front = f"--rgw-frontends=beast endpoint=127.0.0.1:{port}"
        gateway = node.program("radosgw", "-f", "-n", "client.rgw", front)
        stack.enter_context(running(gateway, directory, node.environment))
        wait_for(f"http://127.0.0.1:{port}/", directory / "client.rgw.log")
        yield Server("rgw", f"http://127.0.0.1:{port}", ACCESS_KEY, SECRET_KEY, True, True)


def _wait_for_osd(node: _Node) -> None:
    deadline = time.monotonic() + OSD_SECONDS
    while "1 up" not in node.call("ceph", "osd", "stat"):
        assert time.monotonic() < deadline, "the object store did not come up"
        time.sleep(0.2)


if __name__ == "__main__":
    try:
        unpack(Path(sys.argv[1]))
    except Missing as missing:
        print(missing)
        sys.exit(SKIPPED)
