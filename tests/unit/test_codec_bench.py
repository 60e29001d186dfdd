"""`kvtier bench codec` reports what it should, and only when every block survived."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from kvtier.codec import BlockCodec
from kvtier.errors import ConfigError, CorruptBlock
from tests.codec_support import DATA

# The package has a command of the same name, so the module is asked for by its full name.
bench_codec = importlib.import_module("kvtier.cli.bench_codec")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings mean nothing here: measure as little as possible."""
    monkeypatch.setattr(bench_codec, "_PHASE_SECONDS", 1e-6)
    monkeypatch.setattr(bench_codec, "_SECONDS", 0.0)


def report(capsys: pytest.CaptureFixture[str], path: Path, dtype: str | None = None) -> dict[str, object]:
    bench_codec.run(path, dtype, True)
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_report_on_real_kv(capsys: pytest.CaptureFixture[str]) -> None:
    result = report(capsys, DATA / "kv_bf16.npy")
    assert result["dtype"] == "bfloat16"
    assert (result["blocks"], result["block_bytes"], result["bit_exact"]) == (1, 737_280, True)
    rows = [result["kvtier"], result["zstd_1"], result["zstd_3"]]
    assert all(isinstance(row, dict) and {"ratio", "encode_mb_s", "decode_mb_s"} == set(row) for row in rows)
    ratios = [row["ratio"] for row in rows if isinstance(row, dict)]
    assert ratios[0] >= 1.5 > ratios[1] > 1.2
    planes, bytewise = result["kvtier_plane_slots"], result["kvtier_without_heads"]
    assert isinstance(planes, dict)
    assert isinstance(bytewise, dict)
    assert planes["ratio"] == ratios[0] > bytewise["ratio"] >= 1.45
    assert isinstance(result["decode_vs_without_heads"], float)
    assert isinstance(result["encode_vs_zstd_1"], float)
    assert isinstance(result["decode_vs_zstd_1"], float)


def test_dtypes_and_shapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert report(capsys, DATA / "kv_fp8.npy")["dtype"] == "float8_e4m3fn"
    assert report(capsys, DATA / "kv_fp8.npy", "int8")["dtype"] == "int8"
    np.save(tmp_path / "flat.npy", np.zeros((3, 1000), np.uint16))
    assert report(capsys, tmp_path / "flat.npy", "float16")["block_bytes"] == 2000


def test_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    bench_codec.run(DATA / "kv_fp8.npy", None, False)
    out = capsys.readouterr().out
    assert "kvtier / zstd_1" in out
    assert "bit-exact" in out


def test_unusable_inputs_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros(5, np.uint8))
    np.save(tmp_path / "wide.npy", np.zeros((2, 5), np.float64))
    (tmp_path / "text.npy").write_text("not an array")
    for name in ("objects", "flat", "wide", "text", "missing"):
        with pytest.raises(ConfigError, match=r"--input|--dtype"):
            bench_codec.run(tmp_path / f"{name}.npy", None, True)
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        bench_codec.run(DATA / "kv_fp8.npy", "bfloat16", True)


def test_a_lost_bit_is_reported_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = BlockCodec.decode

    def lossy(self: BlockCodec, block_hash: bytes, encoded: memoryview, out: bytearray) -> None:
        decode(self, block_hash, encoded, out)
        out[-1] ^= 1

    monkeypatch.setattr(BlockCodec, "decode", lossy)
    with pytest.raises(CorruptBlock, match="block 0"):
        bench_codec.run(DATA / "kv_bf16.npy", None, True)
    assert capsys.readouterr().out == ""
