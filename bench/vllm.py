"""Time to first token of vLLM on the CPU: without a cache, with kvtier cold and warm from each tier.

Run in the environment of `make test-vllm`:

    .venv-vllm/bin/python bench/vllm.py --tokens 1000 2000 4000

vLLM's own offloading connector, to stand beside it, refuses to run on a CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from vllm_engines import FastServer, Node, run_table, wait_for

from tests.vllm.engine import EngineProcess


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder, FastServer() as bucket:
        place = Path(folder)
        node = Node(place, "2GiB", bucket)
        config = node.start("disk", "s3")
        options = {"max_model_len": max(arguments.tokens) + 64}
        plain = EngineProcess(None, place / "plain.log", **options)
        cached = EngineProcess(config, place / "cached.log", node.environment, **options)
        try:
            plain.ask("ready")
            cached.ask("ready")
            wait_for(cached, "attached")
            table = run_table(node, plain, cached, arguments.tokens, arguments.rounds, arguments.seed)
        finally:
            plain.kill()
            cached.kill()
            node.stop()
    print(f"{os.cpu_count()} cores, float32, blocks of 32 tokens")
    table.show("no cache")


if __name__ == "__main__":
    main()
