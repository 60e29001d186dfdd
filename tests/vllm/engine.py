"""A vLLM engine in a process of its own, driven over a pipe: what the tests start, ask and kill."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BLOCK = 32
SEED = int(os.environ.get("KVTIER_TEST_SEED", "1"))

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Threads that spin for each other stand still when a core is not theirs alone.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def prompt(seed: object, tokens: int, prefix: Sequence[int] = ()) -> list[int]:
    """Return a prompt that nobody else has, but for its prefix."""
    rng = random.Random(f"{SEED} {seed}")
    return [*prefix, *(rng.randrange(1000, 40_000) for _ in range(tokens - len(prefix)))]


class EngineProcess:
    """An engine; `ask` runs a method of `Server` in it.

    Attributes:
        module: What runs in it: this module, or one whose server can do more.
    """

    module = "tests.vllm.engine"

    def __init__(
        self, config: Path | None, log: Path, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        """Start it.

        Args:
            config: kvtier's configuration; None for vLLM alone.
            log: What it says goes there.
            environment: Variables of its own.
            options: Arguments of `vllm.LLM`.
        """
        self.log = log
        self._to, from_parent = _pipe()[::-1]
        from_child, to_parent = _pipe()
        command = [sys.executable, "-m", self.module, str(from_parent), str(to_parent)]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, json.dumps({"config": config and str(config), "options": options})],
                cwd=REPOSITORY,
                env={**os.environ, **QUIET, **(environment or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(from_parent, to_parent),
            )
        os.close(from_parent)
        os.close(to_parent)
        self._from = os.fdopen(from_child, "r")

    def tell(self, what: str, **arguments: Any) -> None:
        """Ask without waiting for the answer."""
        os.write(self._to, (json.dumps({"what": what, **arguments}) + "\n").encode())

    def answer(self, seconds: float | None = None) -> Any:
        """Return the answer to what was asked; in time, if a time is given."""
        late = not select.select([self._from], [], [], seconds)[0]
        line = "" if late else self._from.readline()
        if not line:
            what = f"says nothing for {seconds:.0f} s" if late else "has ended"
            raise AssertionError(f"the engine {what}:\n{self.log.read_text()[-6000:]}")
        return json.loads(line)

    def ask(self, what: str, **arguments: Any) -> Any:
        """Ask and wait for the answer."""
        self.tell(what, **arguments)
        return self.answer()

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int = 6) -> list[list[int]]:
        """Return the greedy outputs of prompts that come at the same time."""
        return self.ask("generate", prompts=list(prompts), max_tokens=max_tokens)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Let it end by itself."""
        os.close(self._to)
        assert self.process.wait(60) == 0, self.log.read_text()[-6000:]


def _pipe() -> tuple[int, int]:
    return os.pipe()


class Server:
    """The engine, and what can be asked of it."""

    def __init__(self, config: str | None, options: dict[str, Any]) -> None:
        from vllm import LLM

        if config is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "KvTierConnector",
                "kv_connector_module_path": "kvtier.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"config": config},
            }
        defaults = {
            "dtype": "float32",
            "block_size": BLOCK,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.3,
            "max_model_len": 4096,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
        }
        if "model" not in options:
            from kvtier.engine.weights import model_dir

            options["model"] = str(model_dir(cache=os.environ.get("KVTIER_TEST_MODELS")))
        self.llm = LLM(**{**defaults, **options})
        self.adapters: dict[str | None, int] = {None: 0}
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler

    def ready(self) -> bool:
        return True

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        salts: list[str] | None = None,
        adapter: str | None = None,
    ) -> Any:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        asked = [{"prompt_token_ids": tokens} for tokens in prompts]
        for entry, salt in zip(asked, salts or [], strict=False):
            entry["cache_salt"] = salt
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)
        number = self.adapters.setdefault(adapter, len(self.adapters)) if adapter else 0
        lora = LoRARequest(f"adapter {number}", number, adapter) if adapter else None
        outputs = self.llm.generate(asked, parameters, use_tqdm=False, lora_request=lora)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def cancel(self, prompts: list[list[int]], steps: int) -> bool:
        """Begin requests and abort them after some steps."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        names = [f"cancelled-{time.monotonic_ns()}-{n}" for n in range(len(prompts))]
        for name, tokens in zip(names, prompts, strict=True):
            engine.add_request(
                name, {"prompt_token_ids": tokens}, SamplingParams(max_tokens=50, detokenize=False)
            )
        for _ in range(steps):
            engine.step()
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return True

    def lose_next_load(self) -> bool:
        """Let the next load fail."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group().worker

        def fail(transfers: Any, store: Any, load: Any) -> None:
            del worker._copy_in
            raise RuntimeError("lost")

        worker._copy_in = fail
        return True

    def fail_a_pass(self, tokens: list[int]) -> int:
        """Let a pass fail halfway through the layers; returns how many blocks of its prompt are stored.

        The engine is of no use any more.
        """
        from kvtier.hashing import chain_root, hash_blocks

        core = self.llm.llm_engine.engine_core.engine_core
        layer = core.model_executor.driver_worker.worker.model_runner.model.model.layers[1]

        def fail(*arguments: Any, **named: Any) -> Any:
            raise RuntimeError("out of memory")

        layer.forward = fail
        try:
            self.generate([tokens], 1)
        except RuntimeError:
            half = self.scheduler.connector.scheduler
            names = hash_blocks(chain_root(half.engine.namespace.id), tokens, BLOCK)
            return len(half._store().match(names).slots)
        raise AssertionError("the pass did not fail")

    def timed(self, tokens: list[int]) -> float:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        begun = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        return time.perf_counter() - begun

    def forget(self) -> bool:
        """Empty vLLM's own prefix cache."""
        return bool(self.llm.reset_prefix_cache())

    def forget_all(self) -> bool:
        return bool(self.llm.reset_prefix_cache(reset_connector=True))

    def attached(self) -> bool:
        """Say whether the scheduler's half and that of a worker in this process have their agent."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        halves = [self.scheduler.connector.scheduler]
        if has_kv_transfer_group():
            halves.append(get_kv_transfer_group().worker)
        return all(half._store().stats()["client_connected"] for half in halves)

    def counts(self) -> dict[str, Any]:
        """Return what vLLM says of external hits, and what kvtier says of itself."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        metrics = {metric.name: getattr(metric, "value", None) for metric in self.llm.get_metrics()}
        half = self.scheduler.connector.scheduler
        return {
            "vllm_external_hits": metrics.get("vllm:external_prefix_cache_hits"),
            "vllm_preemptions": metrics.get("vllm:num_preemptions"),
            "in_vllm_metrics": {k: v for k, v in metrics.items() if k.startswith("vllm:kvtier_")},
            **half.take_counts(),
            "worker": get_kv_transfer_group().worker.take_counts() if has_kv_transfer_group() else {},
            "store": half.store_stats(),
        }


def main(kind: type[Server] = Server) -> None:
    """Serve what is asked over the pipes that the command line names."""
    asked, answers = os.fdopen(int(sys.argv[1]), "r"), os.fdopen(int(sys.argv[2]), "w")
    server = kind(**json.loads(sys.argv[3]))
    for line in asked:
        arguments = json.loads(line)
        print(json.dumps(getattr(server, arguments.pop("what"))(**arguments)), file=answers, flush=True)
    del server


if __name__ == "__main__":
    main()
