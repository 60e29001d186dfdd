"""Block identity: what must change a hash, what must not, and stability between processes and releases."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.hashing import MultimodalItem, Namespace, chain_root, hash_blocks

ROOT = chain_root(b"n" * 16)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=64)


def test_known_answers():
    """A stored block must be found by every later release: these values may never change."""
    assert chain_root(b"n" * 16).hex() == "5e801a3132f98b0dc4b941886baab230"
    assert chain_root(b"n" * 16, "tenant", 7).hex() == "dee076f8e63bf2303d5f21bb40c2b2f6"
    assert [h.hex() for h in hash_blocks(ROOT, range(8), 4)] == [
        "9ca5c0149b5eb739c6c88784cfd9db71",
        "82f8267fc86bbf4ca71ea0a57ca30483",
    ]
    assert Namespace.from_facts({"model": "m"}).hex == "4dbb5bd6fe71d10f770ec759349506f2"


def test_hashes_do_not_depend_on_the_process():
    code = (
        "from kvtier.hashing import *\n"
        "print(hash_blocks(chain_root(b'n'*16, 'salt', 3), list(range(100)), 32)[-1].hex())"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second


@given(tokens, st.integers(1, 9))
def test_chaining_in_pieces_gives_the_same_hashes(prompt, size):
    whole = hash_blocks(ROOT, prompt, size)
    assert len(whole) == len(prompt) // size
    pieces, parent = [], ROOT
    for index in range(len(whole)):
        pieces += hash_blocks(parent, prompt[index * size : (index + 1) * size], size, first_block=index)
        parent = pieces[-1]
    assert pieces == whole


@given(st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=64), st.data())
def test_any_earlier_token_changes_all_later_hashes(prompt, data):
    where = data.draw(st.integers(0, len(prompt) // 4 * 4 - 1))
    changed = list(prompt)
    changed[where] ^= 1
    before, after = hash_blocks(ROOT, prompt, 4), hash_blocks(ROOT, changed, 4)
    assert before[: where // 4] == after[: where // 4]
    assert not set(before[where // 4 :]) & set(after)


@given(tokens)
def test_lists_and_arrays_hash_alike(prompt):
    expected = hash_blocks(ROOT, prompt, 4)
    assert hash_blocks(ROOT, tuple(prompt), 4) == expected
    assert hash_blocks(ROOT, np.array(prompt, dtype=np.int64), 4) == expected


def test_roots_keep_namespaces_salts_and_adapters_apart():
    salts = [None, "", "7", 7, "a", "-", "s7"]
    adapters = [None, 0, 7, 77]
    roots = {chain_root(n * 16, salt, lora) for n in (b"n", b"m") for salt in salts for lora in adapters}
    assert len(roots) == 2 * len(salts) * len(adapters)


def test_a_multimodal_item_changes_the_blocks_that_it_overlaps_and_those_after():
    prompt = list(range(24))
    plain = hash_blocks(ROOT, prompt, 4)
    image = MultimodalItem(b"cat", start=6, length=4)
    with_image = hash_blocks(ROOT, prompt, 4, multimodal=[image])
    assert with_image[0] == plain[0]
    assert not set(with_image[1:]) & set(plain)
    for other in (
        MultimodalItem(b"dog", 6, 4),
        MultimodalItem(b"cat", 5, 4),
        # The same picture at another resolution.
        MultimodalItem(b"cat", 6, 5),
    ):
        assert hash_blocks(ROOT, prompt, 4, multimodal=[other])[1] != with_image[1]


def test_multimodal_items_hash_alike_when_chained_in_pieces():
    prompt, image = list(range(24)), MultimodalItem(b"cat", 6, 9)
    whole = hash_blocks(ROOT, prompt, 4, multimodal=[image])
    tail = hash_blocks(whole[1], prompt[8:], 4, first_block=2, multimodal=[image])
    assert tail == whole[2:]


def test_namespaces_differ_by_every_fact_and_not_by_order():
    base = {"model": "m", "dtype": "bfloat16", "layers": 2}
    assert Namespace.from_facts(base).id == Namespace.from_facts(dict(reversed(base.items()))).id
    for key in base:
        assert Namespace.from_facts({**base, key: "other"}).id != Namespace.from_facts(base).id


def test_the_namespace_document_can_be_read_back():
    namespace = Namespace.from_facts({"model": "m", "config": {"layers": 2}})
    document = json.loads(namespace.document())
    assert document.pop("id") == namespace.hex
    document.pop("format_version")
    assert Namespace.from_facts(document).id == namespace.id
