"""vLLM's own scheduler with kvtier under a model of a model, whose KV says which tokens it was computed from.

Every element of a token's K and V is a hash of the tokens up to it. So each step can look whether what it
builds on is right, whoever computed, stored and loaded it.
"""

from __future__ import annotations

import json
import random
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvtier.vllm import KvTierConnector

BLOCK, HEAD, LAYERS = 4, 128, 4
DRAFTS = 3
JUNK = -1
# More threads would wait for each other where cores are shared.
torch.set_num_threads(1)
PLAIN = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}


class Machine:
    """The engine.

    Attributes:
        scheduler: vLLM's.
        worker: The worker's half of the connector.
        requests: All that ever came, by name.
        said: The tokens that each has been given, by name.
    """

    def __init__(
        self,
        place: Path,
        tiers: str,
        *,
        pages: int,
        seed: object = 0,
        budget: int = 64,
        asynchronous: bool = False,
        drafts: bool = False,
        second_runner: bool = False,
        policy: str = "recompute",
    ) -> None:
        """Make it.

        Args:
            place: A folder for its files.
            tiers: kvtier's settings.
            pages: Blocks of the pool, of which vLLM keeps one.
            seed: Of how many drafts are right.
            budget: Tokens of one step.
            asynchronous: Whether a step is scheduled before the last one's tokens are known.
            drafts: Whether there are drafts.
            second_runner: Whether requests that were paused come as new ones.
            policy: vLLM's `kv_load_failure_policy`.
        """
        (place / "config.json").write_text(json.dumps(PLAIN))
        (place / "kvtier.yaml").write_text(tiers)
        speculative = SpeculativeConfig(model="ngram", num_speculative_tokens=DRAFTS) if drafts else None
        config = VllmConfig(
            model_config=ModelConfig(model=str(place), skip_tokenizer_init=True, dtype="float32"),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=budget,
                max_model_len=512,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=asynchronous,
                watermark=0.0,
            ),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
            kv_transfer_config=KVTransferConfig(
                kv_connector="KvTierConnector",
                kv_connector_module_path="kvtier.vllm",
                kv_role="kv_both",
                kv_connector_extra_config={"config": str(place / "kvtier.yaml")},
                kv_load_failure_policy=policy,
            ),
            device_config=DeviceConfig("cpu"),
            speculative_config=speculative,
        )
        names = [f"layers.{n}" for n in range(LAYERS)]
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=HEAD, dtype=torch.float32)
        caches = KVCacheConfig(pages, [], [KVCacheGroupSpec(names, spec)])
        config.cache_config.num_gpu_blocks = pages
        kind = AsyncScheduler if asynchronous else Scheduler
        self.scheduler = kind(
            vllm_config=config,
            kv_cache_config=caches,
            log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self.scheduler.use_v2_model_runner = second_runner
        self.worker = KvTierConnector(config, KVConnectorRole.WORKER, caches)
        pool = torch.zeros(LAYERS, pages, 1, BLOCK, 2 * HEAD)
        self.worker.register_kv_caches(dict(zip(names, pool, strict=True)))
        self._planes = self.worker.worker._pool.planes
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._rng = random.Random(f"{seed}")
        self._ahead = 2 if asynchronous else 1
        self._ordered: deque[tuple[Any, dict[str, tuple[int, list[int]]]]] = deque()
        self._drafts = drafts
        init_none_hash(sha256)
        self.requests: dict[str, Request] = {}
        self.said: dict[str, list[int]] = {}
        self._doubtful: set[str] = set()

    @property
    def store(self) -> Any:
        """kvtier's store."""
        return self.scheduler.connector.scheduler._store()

    def add(self, name: str, prompt: list[int], new: int) -> Request:
        """Let a request come."""
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=new, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.requests[name], self.said[name] = request, []
        self.scheduler.add_request(request)
        return request

    def cancel(self, name: str) -> None:
        """Let it go."""
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedule a step, and run the oldest if as many are ordered as may be."""
        output = self.scheduler.schedule()
        tables = {}
        new = {data.req_id: data.num_computed_tokens for data in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        new |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name in output.num_scheduled_tokens:
            tables[name] = (new[name], list(self.scheduler.kv_cache_manager.get_block_ids(name)[0]))
        self._ordered.append((output, tables))
        if len(self._ordered) >= self._ahead:
            self._run()

    def run_out(self, steps: int = 2000) -> None:
        """Run until nothing is left to do."""
        while self.scheduler.has_requests():
            steps -= 1
            assert steps, "requests are stuck"
            self.step()
        self.finish_ordered()

    def finish_ordered(self) -> None:
        """Run what is ordered, and order nothing more."""
        while self._ordered:
            self._run()

    def preempted(self) -> int:
        """Return how often requests were paused."""
        return sum(request.num_preemptions for request in self.requests.values())

    def close(self) -> None:
        """End it."""
        self.worker.shutdown()
        self.scheduler.connector.shutdown()

    def _run(self) -> None:
        output, tables = self._ordered.popleft()
        worker = self.worker
        worker.bind_connector_metadata(output.kv_connector_metadata)
        if output.has_sync_kv_loads:
            worker.start_load_kv(None)
        failed = set(worker.worker._failed_pages)
        for _, later in [(output, tables), *self._ordered]:
            # One of those that share a page computes it again; vLLM lets others run ahead of it.
            self._doubtful |= {name for name, (_, pages) in later.items() if failed.intersection(pages)}
        sampled = {name: self._compute(name, output, *tables[name]) for name in tables}
        if not output.has_sync_kv_loads:
            worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        told = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        names = list(tables)
        answer = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: n for n, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            kv_connector_output=told,
        )
        outputs = self.scheduler.update_from_output(output, answer)
        for group in outputs.values():
            for one in group.outputs:
                self.said[one.request_id] += one.new_token_ids
        if self._drafts:
            speaking = [name for name in names if sampled[name] and name in self.scheduler.requests]
            guesses = [[next_token(self._text(name), n) for n in range(DRAFTS)] for name in speaking]
            self.scheduler.update_draft_token_ids(DraftTokenIds(speaking, guesses))

    def _text(self, name: str) -> list[int]:
        return [*self.requests[name].prompt_token_ids, *self.said[name]]

    def _compute(self, name: str, output: Any, done: int, pages: list[int]) -> list[int]:
        """Look at what a request builds on, compute its tokens of the step, and return what it says."""
        count = output.num_scheduled_tokens[name]
        drafts = output.scheduled_spec_decode_tokens.get(name, [])
        text = self._text(name)
        # What ran ahead is given back when the tokens of the step before are known.
        done = min(done, len(text) - 1)
        known = text[: done + count - len(drafts)]
        marks = chain([*text, *(next_token(text, n) for n in range(len(drafts)))])
        wrong = self._wrong(pages, marks[:done])
        assert name in self._doubtful or not wrong, f"tokens {wrong} of {name} are not what its text says"
        for at in range(done, len(known)):
            self._write(pages, at, JUNK if wrong else marks[at])
        if len(known) < len(text):
            return []
        right = self._rng.randrange(len(drafts) + 1)
        for n in range(len(drafts)):
            # Those that are not accepted leave something behind in the pages.
            self._write(pages, len(text) + n, marks[len(text) + n] if n < right and not wrong else JUNK)
        return [next_token(text, n) for n in range(right + 1)]

    def _wrong(self, pages: list[int], marks: list[int]) -> list[int]:
        """Return the places whose KV is not what the text up to there makes of it."""
        blocks = pages[: -(-len(marks) // BLOCK)]
        good = torch.ones(len(marks), dtype=torch.bool)
        for plane in self._planes:
            rows = plane[blocks].movedim(-2, 1).reshape(len(blocks) * BLOCK, LAYERS * HEAD)
            good &= (rows[: len(marks)] == torch.tensor(marks, dtype=torch.int32)[:, None]).all(1)
        return (~good).nonzero().flatten().tolist()

    def _write(self, pages: list[int], at: int, value: int) -> None:
        if at // BLOCK < len(pages):
            for plane in self._planes:
                plane[pages[at // BLOCK]][..., at % BLOCK, :] = value


def chain(text: list[int]) -> list[int]:
    """Return what the KV of each token of a text looks like."""
    marks, last = [], 0
    for token in text:
        last = zlib.crc32(b"%d" % token, last)
        marks.append(last & 0x3FFFFFFF)
    return marks


def next_token(text: list[int], ahead: int) -> int:
    """Return what is said after a text: the token `ahead` of the next."""
    return zlib.crc32(f"{text[:2]} {len(text) + ahead}".encode()) % 1000
