"""What the native decoder refuses: each field by its name and value, before anything is written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.execution.native_samples import SAMPLE
from engine.kernels.cpu import CpuBackend
from engine.kernels.decoder_abi import Norm, Weight
from engine.kernels.library import KernelError
from tests.engine.kernels.table_decoder import NUM_BLOCKS, Array, Step, TableDecoder, pack_floats

VOCAB_SIZE, DIM = 40, 6
POISON = -7


@pytest.fixture(scope="module")
def decoder(cpu: CpuBackend) -> TableDecoder:
    table = pack_floats(cpu.library, np.ones((VOCAB_SIZE, DIM)))
    return TableDecoder(cpu.library, table, table)


class Prepared:
    """A step of two sequences, 3 tokens that begin one and 2 that go on another, and two samples."""

    def __init__(self) -> None:
        samples = np.zeros(2, dtype=SAMPLE)
        samples["top_p"], samples["token_id"], samples["row"] = 1.0, POISON, [0, 1]
        self.step = Step([1, 2, 3, 4, 5], samples)
        self.arrays: dict[str, Array] = {
            "query_start_loc": np.array([0, 3, 5], dtype=np.int32),
            "seq_lens": np.array([3, 6], dtype=np.int32),
            "block_tables": np.array([[1, -1, 9], [0, 4, -5]], dtype=np.int32),  # what no token needs is not looked at
            "logits_rows": np.array([2, 4], dtype=np.int32),
        }
        self.arrays |= {"token_ids": self.step.token_ids, "samples": samples}
        params = self.step.params
        for name, array in self.arrays.items():
            setattr(params, name, array.ctypes.data)
        params.block_table_stride = params.max_blocks = 3
        params.num_seqs, params.num_logits_rows, params.num_samples = 2, 2, 2


def test_the_step_is_right_as_it_stands(decoder: TableDecoder) -> None:
    prepared = Prepared()
    decoder.run(prepared.step.params)
    assert prepared.arrays["samples"]["token_id"].tolist() == [0, 0]


def check_refused(decoder: TableDecoder, prepared: Prepared, message: str) -> None:
    pool = decoder.kv_pool.copy()
    with pytest.raises(KernelError, match=rf"decoder_step \(libquire_cpu\.so\): .*{message}"):
        decoder.run(prepared.step.params)
    assert np.array_equal(decoder.kv_pool, pool), "the KV pool was written"
    assert (prepared.arrays["samples"]["token_id"] == POISON).all(), "a sample was written"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_threads", 0),
        ("num_tokens", 0),
        ("num_seqs", 0),
        ("num_seqs", 6),
        ("max_blocks", 0),
        ("num_samples", -1),
        ("num_logits_rows", -1),
        ("num_logits_rows", 6),
        ("token_ids", None),
        ("query_start_loc", None),
        ("seq_lens", None),
        ("block_tables", None),
        ("samples", None),
        ("logits_rows", None),
    ],
)
def test_fields_of_a_step(field: str, value: int | None, decoder: TableDecoder) -> None:
    prepared = Prepared()
    setattr(prepared.step.params, field, value)
    check_refused(decoder, prepared, f"{field} is NULL" if value is None else f"{field}={value}")


def test_a_step_of_another_version(decoder: TableDecoder) -> None:
    prepared = Prepared()
    prepared.step.params.size = 8
    check_refused(decoder, prepared, "params have 8 bytes, the library expects 104")
    prepared = Prepared()
    prepared.step.params.abi_version = 99
    check_refused(decoder, prepared, "ABI version 99")


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("query_start_loc", 0, 1, r"query_start_loc\[0\]=1"),
        ("query_start_loc", 1, 0, "query_start_loc=0"),
        ("query_start_loc", 1, 6, "query_start_loc=6"),
        ("query_start_loc", 2, 4, "query_start_loc of the end=4"),
        ("seq_lens", 0, 2, "seq_lens=2"),
        ("seq_lens", 1, 13, "seq_lens=13"),  # 3 blocks of 4
        ("block_tables", (0, 0), -1, "block_tables=-1"),
        ("block_tables", (1, 1), NUM_BLOCKS, f"block_tables={NUM_BLOCKS}"),
        ("logits_rows", 1, 5, "logits_rows=5"),
        ("logits_rows", 0, -1, "logits_rows=-1"),
        ("token_ids", 4, VOCAB_SIZE, f"token_ids={VOCAB_SIZE}"),
        ("token_ids", 0, -1, "token_ids=-1"),
    ],
)
def test_elements_of_a_steps_arrays(name: str, at: Any, value: int, message: str, decoder: TableDecoder) -> None:
    prepared = Prepared()
    prepared.arrays[name][at] = value
    check_refused(decoder, prepared, message)


def test_a_sequence_ends_where_the_table_of_positions_does(decoder: TableDecoder) -> None:
    prepared = Prepared()
    tables = np.zeros((2, 9), dtype=np.int32)
    prepared.step.params.block_tables = tables.ctypes.data
    prepared.step.params.block_table_stride = prepared.step.params.max_blocks = 9
    prepared.arrays["seq_lens"][1] = 31
    check_refused(decoder, prepared, "seq_lens=31.* 30")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("row", 2, "row of a sample=2"),
        ("row", -1, "row of a sample=-1"),
        ("temperature", -0.5, "temperature=-0.5"),
        ("temperature", np.nan, "temperature=nan"),
        ("top_p", 0.0, "top_p=0"),
        ("top_p", np.nan, "top_p=nan"),
        ("min_p", 1.5, "min_p=1.5"),
        ("min_p", -0.1, "min_p=-0.1"),
        ("num_candidates", -1, "num_candidates=-1"),
        ("num_candidates", VOCAB_SIZE + 1, f"num_candidates={VOCAB_SIZE + 1}"),
        ("num_candidates", 2, "candidates is NULL"),
    ],
)
def test_fields_of_a_sample(name: str, value: float, message: str, decoder: TableDecoder) -> None:
    prepared = Prepared()
    prepared.arrays["samples"][name][1] = value
    check_refused(decoder, prepared, message)


def _set(field: str, value: Any) -> Callable[[Any], None]:
    return lambda params: setattr(params, field, value)


def _weight(path: str, **fields: Any) -> Callable[[Any], None]:
    def change(params: Any) -> None:
        layer, _, name = path.rpartition(".")
        weight: Weight = getattr(params.layers[0] if layer else params, name)
        for field, value in fields.items():
            setattr(weight, field, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("kv_pool", None), "kv_pool is NULL"),
        (_set("layers", None), "layers is NULL"),
        (_set("num_layers", 0), "num_layers=0"),
        (_set("vocab_size", 0), "vocab_size=0"),
        (_set("embedding_dim", 0), "embedding_dim=0"),
        (_set("hidden_size", -1), "hidden_size=-1"),
        (_set("intermediate_size", 0), "intermediate_size=0"),
        (_set("num_heads", 0), "num_heads=0"),
        (_set("num_kv_heads", 2), "num_kv_heads=2"),
        (_set("head_dim", 0), "head_dim=0"),
        (_set("head_dim", 3), "head_dim=3 is odd"),
        (_set("max_positions", 0), "max_positions=0"),
        (_set("activation", 4), "activation=4"),
        (_set("kv_type", 3), "kv_type=3"),
        (_set("num_blocks", 0), "num_blocks=0"),
        (_set("block_size", 512), "block_size=512"),
        (_set("block_size", 12), "block_size=12 is no power of two"),
        (_set("size", 8), "8"),
        (_set("abi_version", 0), "0"),
        (_weight("embedding", data=None), "embedding is missing"),
        (_weight("head", n=39), r"head is \[39, 6\], expected \[40, 6\]"),
        (_weight("layer.query", type=8), "query has type 8"),
        (_weight("layer.key", k=5), r"key is \[2, 5\], expected \[2, 6\]"),
        (_weight("layer.value", data=None), "value is missing"),
        (_weight("layer.attention_out", n=7), r"attention_out is \[7, 2\], expected \[6, 2\]"),
        (_weight("layer.up", data=None), "up is missing"),
        (_weight("layer.down", k=17), r"down is \[6, 17\], expected \[6, 16\]"),
        (_weight("layer.gate", data=1, n=3), r"gate is \[3, 0\], expected \[16, 6\]"),
        (lambda params: setattr(params.layers[0], "attention_norm", Norm()), "attention_norm is NULL"),
        (lambda params: setattr(params.layers[0], "mlp_norm", Norm()), "mlp_norm is NULL"),
        (lambda params: setattr(params.layers[0], "sliding_window", -1), "sliding_window=-1"),
    ],
)
def test_descriptions_of_a_decoder(change: Callable[[Any], None], message: str, cpu: CpuBackend) -> None:
    table = pack_floats(cpu.library, np.ones((VOCAB_SIZE, DIM)))
    params = TableDecoder(cpu.library, table, table).params
    change(params)
    handle = ctypes.c_void_p()
    assert cpu.library.symbols.quire_decoder_create(ctypes.byref(params), ctypes.byref(handle)) != 0
    assert not handle
    with pytest.raises(KernelError, match=message):
        cpu.library.raise_last_error("decoder_create")


def test_a_model_that_needs_a_projection_has_one(cpu: CpuBackend) -> None:
    table = pack_floats(cpu.library, np.ones((VOCAB_SIZE, DIM)))
    params = TableDecoder(cpu.library, table, table).params
    params.embedding_dim, params.embedding.k, params.head.k = 4, 4, 4
    handle = ctypes.c_void_p()
    assert cpu.library.symbols.quire_decoder_create(ctypes.byref(params), ctypes.byref(handle)) != 0
    assert cpu.library.last_error() == "decoder_create: project_in is missing"


def test_heads_that_do_not_divide(cpu: CpuBackend) -> None:
    table = pack_floats(cpu.library, np.ones((VOCAB_SIZE, DIM)))
    params = TableDecoder(cpu.library, table, table).params
    params.num_heads, params.num_kv_heads = 3, 2
    handle = ctypes.c_void_p()
    assert cpu.library.symbols.quire_decoder_create(ctypes.byref(params), ctypes.byref(handle)) != 0
    assert cpu.library.last_error() == "decoder_create: num_heads=3 is no multiple of num_kv_heads=2"
