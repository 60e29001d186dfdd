"""An engine that also tells what its KV pool holds, for comparisons of bytes: run by `vllm_gpu.py`."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from tests.vllm.engine import Server, main

_GARBAGE = 0x4049


class CheckedServer(Server):
    """The engine, and what can be asked of it besides."""

    def __init__(self, config: str | None, options: dict[str, Any]) -> None:
        super().__init__(config, options)
        self._pages: list[int] = []
        schedule = self.scheduler.schedule

        def noting(*arguments: Any) -> Any:
            output = schedule(*arguments)
            for request in output.scheduled_new_reqs:
                self._pages = list(request.block_ids[0])
            return output

        self.scheduler.schedule = noting

    def scored(self, tokens: list[int], max_tokens: int) -> list[list[float]]:
        """Return the greedy output of a prompt, each token with its log probability."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, logprobs=1, detokenize=False, ignore_eos=True
        )
        (output,) = self.llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        (sampled,) = output.outputs
        return [
            [token, ranks[token].logprob]
            for token, ranks in zip(sampled.token_ids, sampled.logprobs, strict=True)
        ]

    def sums(self, blocks: int) -> list[str]:
        """Return a checksum of each of the first blocks of the last prompt, as they lie in the pool."""
        hashes = [hashlib.blake2b(digest_size=8) for _ in range(blocks)]
        for cache in self._caches():
            pages = torch.tensor(self._pages[:blocks], device=cache.device)
            held = cache[pages].contiguous().view(torch.uint8).flatten(1).cpu().numpy()
            for checksum, row in zip(hashes, held, strict=True):
                checksum.update(row)
        return [checksum.hexdigest() for checksum in hashes]

    def scramble(self) -> bool:
        """Overwrite the whole pool; vLLM's own prefix cache has to be emptied before."""
        for cache in self._caches():
            cache.view(torch.int16).fill_(_GARBAGE)
        return True

    def _caches(self) -> Any:
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        # The device has ended what was asked of it so far, also on other streams.
        caches = executor.driver_worker.worker.model_runner.kv_caches
        if caches[0].is_cuda:
            torch.cuda.synchronize()
        return caches


if __name__ == "__main__":
    main(CheckedServer)
