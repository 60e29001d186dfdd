"""Hashes found again are the hashes of these tokens, and of no others."""

from __future__ import annotations

import random
from array import array

import pytest

from kvtier.connector import hash_cache
from kvtier.connector.hash_cache import CHUNK_BLOCKS, HashCache
from kvtier.hashing import chain_root, hash_blocks
from kvtier.trtllm.request import Identity, RequestState

SIZE = 2
NAMESPACE = bytes(16)
ROOT = chain_root(NAMESPACE)


def remember(cache: HashCache, tokens: list[int], root: bytes = ROOT) -> None:
    cache.add(root, array("i", tokens), hash_blocks(root, tokens, SIZE))


def find(cache: HashCache, tokens: list[int], root: bytes = ROOT) -> list[bytes]:
    return cache.find(root, array("i", tokens), len(tokens) // SIZE)


def test_whole_chunks_of_a_common_prefix_are_found():
    cache, chunk = HashCache(SIZE), CHUNK_BLOCKS * SIZE
    tokens = list(range(3 * chunk + 7))
    remember(cache, tokens)
    assert find(cache, [*tokens, 1, 2, 3]) == hash_blocks(ROOT, tokens, SIZE)[: 3 * CHUNK_BLOCKS]
    assert len(find(cache, tokens[: 2 * chunk + 5])) == 2 * CHUNK_BLOCKS
    assert len(find(cache, [*tokens[: 2 * chunk - 1], -1, *tokens[2 * chunk :]])) == CHUNK_BLOCKS
    assert find(cache, tokens[: chunk - 1]) == []
    assert find(cache, tokens, chain_root(NAMESPACE, "tenant")) == []
    # The same chunk in another place of a chain has other hashes.
    assert find(cache, tokens[chunk:]) == []


def test_the_oldest_go_first_and_orphans_are_never_found(monkeypatch):
    monkeypatch.setattr(hash_cache, "MAX_TOKENS", 4 * CHUNK_BLOCKS * SIZE)
    cache, chunk = HashCache(SIZE), CHUNK_BLOCKS * SIZE
    first, second = list(range(2 * chunk)), list(range(7, 3 * chunk + 7))
    remember(cache, first)
    remember(cache, second)
    assert len(cache) == 4
    assert find(cache, first) == []
    assert len(find(cache, second)) == 3 * CHUNK_BLOCKS


@pytest.mark.parametrize("seed", range(5))
def test_requests_get_the_hashes_that_they_would_compute(seed):
    rng = random.Random(seed)
    cache = HashCache(SIZE)
    prompts = [[rng.randrange(3) for _ in range(CHUNK_BLOCKS * SIZE * 2)] for _ in range(3)]
    for _ in range(60):
        tokens = rng.choice(prompts)[: rng.randrange(1, 2 * CHUNK_BLOCKS * SIZE)] + [5] * rng.randrange(300)
        identity = Identity(rng.choice([None, "tenant"]))
        state = RequestState.start(identity, NAMESPACE, SIZE, cache)
        state.see_tokens(array("i", tokens))
        blocks = len(tokens) // SIZE
        for count in sorted({rng.randrange(blocks + 1), blocks}):
            found = state.hash_through(count)
            assert found == hash_blocks(chain_root(NAMESPACE, identity.salt), tokens, SIZE)[: len(found)]
            assert len(found) >= count
        prompts.append(tokens)
