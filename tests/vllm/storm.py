"""An engine that can be put through storms: requests that come, are cancelled and paused at random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.hashing import chain_root, hash_blocks
from tests.vllm.engine import BLOCK, SEED, EngineProcess, Server, main, prompt


class StormProcess(EngineProcess):
    """An engine with what storms need."""

    module = "tests.vllm.storm"


def storm(name: object, requests: int, new: int) -> list[dict[str, Any]]:
    """Return requests, of families with a common prefix, each with its step of arrival and some with an end.

    Args:
        name: Which storm; the same name and seed give the same storm.
        requests: How many.
        new: Tokens that each asks for at most.
    """
    rng = random.Random(f"{SEED} {name}")
    families = [prompt(f"{name} family {n}", rng.randrange(1, 6) * BLOCK + n) for n in range(4)]
    plan, step = [], 0
    for n in range(requests):
        step += rng.choice([0, 0, 0, 1, 2, 5])
        family = rng.choice(families)
        prefix = family[: rng.randrange(1, len(family))] if rng.random() < 0.2 else family
        tokens = prompt(f"{name} {n}", len(prefix) + rng.randrange(1, 3 * BLOCK), prefix)
        # Some are cancelled in the moment they come, some while they wait, run, are paused, or never.
        life = rng.choice([0, 1, rng.randrange(2, 30), None, None])
        plan.append({"at": step, "prompt": tokens, "new": rng.randrange(1, new), "life": life})
    return plan


class StormServer(Server):
    """The engine."""

    def storm(self, plan: list[dict[str, Any]], seed: str, forget: float = 0.0) -> list[list[int]]:
        """Run requests by a plan; returns what each had said at its end, cancelled ones included.

        Args:
            plan: See `storm`.
            seed: Of when the engine's own prefix cache is emptied.
            forget: How probable that is in a step.
        """
        from vllm import SamplingParams

        rng, engine = random.Random(seed), self.llm.llm_engine
        said: list[list[int]] = [[] for _ in plan]
        running: dict[str, int | None] = {}
        waiting = dict(enumerate(plan))
        step = 0
        while waiting or running:
            for n in [n for n, request in waiting.items() if request["at"] <= step]:
                request = waiting.pop(n)
                engine.add_request(
                    f"{seed} {n}",
                    {"prompt_token_ids": request["prompt"]},
                    SamplingParams(
                        temperature=0.0, max_tokens=request["new"], detokenize=False, ignore_eos=True
                    ),
                )
                running[f"{seed} {n}"] = None if request["life"] is None else step + request["life"]
            for output in engine.step():
                said[int(output.request_id.rsplit(maxsplit=1)[1])] = list(output.outputs[0].token_ids)
                if output.finished:
                    running.pop(output.request_id, None)
            gone = [name for name, end in running.items() if end is not None and end <= step]
            engine.abort_request(gone)
            for name in gone:
                del running[name]
            if rng.random() < forget:
                engine.reset_prefix_cache()
            step += 1
        while engine.has_unfinished_requests():
            engine.step()
        return said

    def drafts(self) -> int:
        """Return how many drafts were made."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts")

    def spread(self, texts: list[list[int]]) -> dict[str, float]:
        """Compare the blocks stored for some texts with such as are computed now, one text after the other.

        Returns:
            `blocks` that were compared, and the `worst` difference of two of their elements.
        """
        stormy = self._stored(texts)
        self.forget_all()
        for tokens in texts:
            self.generate([tokens], 1)
        calm = self._stored(texts)
        shared = stormy.keys() & calm.keys()
        worst = max((float(np.abs(stormy[key] - calm[key]).max()) for key in shared), default=0.0)
        return {"blocks": len(shared), "worst": worst}

    def _stored(self, texts: list[list[int]]) -> dict[tuple[int, ...], NDArray[np.float32]]:
        """Return what this time of the engine's life has stored, by the text up to a block's end."""
        half, found = self.scheduler.connector.scheduler, {}
        root = chain_root(half.engine.namespace.id)
        if half._era is not None:
            root = chain_root(root, half._era)
        size, store = half.engine.layout.tokens_per_block, half._store()
        for tokens in texts:
            match = store.match(hash_blocks(root, tokens, size), 5.0)
            for n, slot in enumerate(match.slots, 1):
                found[tuple(tokens[: n * size])] = np.frombuffer(store.slot_view(slot), np.float32).copy()
            store.release(match.lease)
        return found


if __name__ == "__main__":
    main(StormServer)
