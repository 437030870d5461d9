"""GGML's block-quantised types, decoded to float32 with torch.

A block stores 32 (or, for the K types, 256) consecutive elements of a row: small integers q, and the scales d (and
minima m) that turn them into `d * q` or `d * q + m`. Each function below takes blocks `[n, block_bytes]` of uint8 and
returns their elements `[n, block_size]`; its first comment draws the block.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

from engine.loading.gguf_reader import GGUFTensor, TensorType

# Elements decoded at a time: intermediates stay in the second-level cache, which triples the speed.
_CHUNK_ELEMENTS = 1 << 18


def dequantize(
    data: mmap.mmap, tensor: GGUFTensor, rows: range | None = None, columns: range | None = None
) -> torch.Tensor:
    """The tensor as stored (F32, F16, BF16; a view of `data`) or decoded to float32; or some of its rows and columns.

    Args:
        rows: of the first dimension.
        columns: of the last one of two.
    """
    kind, width = tensor.type, tensor.shape[-1]
    rows, columns = rows or range(tensor.shape[0]), columns or range(width)
    begin = tensor.num_bytes * rows.start // tensor.shape[0]
    num_bytes = tensor.num_bytes * len(rows) // tensor.shape[0]
    shape = (len(rows), *tensor.shape[1:])
    if kind.name in _FLOATS:
        count = num_bytes // kind.block_bytes
        floats = torch.frombuffer(data, dtype=_FLOATS[kind.name], count=count, offset=tensor.start + begin).view(shape)
        return floats if len(columns) == width else floats[..., columns.start : columns.stop]
    raw = torch.frombuffer(data, dtype=torch.uint8, count=num_bytes, offset=tensor.start + begin)
    blocks = raw.view(-1, width // kind.block_size, kind.block_bytes)
    if len(columns) == width:
        return _decode(blocks.view(-1, kind.block_bytes), kind).view(shape)
    first, end = columns.start // kind.block_size, -(-columns.stop // kind.block_size)
    values = _decode(blocks[:, first:end].reshape(-1, kind.block_bytes), kind).view(*shape[:-1], -1)
    skipped = columns.start - first * kind.block_size
    return values[..., skipped : skipped + len(columns)]


def _decode(blocks: torch.Tensor, kind: TensorType) -> torch.Tensor:
    decode = _DECODERS[kind.name]
    out = torch.empty(blocks.shape[0], kind.block_size)
    step = _CHUNK_ELEMENTS // kind.block_size
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = decode(blocks[start : start + step])
    return out


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 `[n, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """`[n, w]` bytes → `[n, 2, w]`: all the low nibbles, then all the high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """4 little-endian bytes → their 32 bits, lowest first: `[n, 4]` → `[n, 32]`."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).view(packed.shape[0], 32)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | 16 bytes: elements 0..15 low, 16..31 high |
    return (_nibbles(blocks[:, 2:18]).view(-1, 32).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | m: f16 | 16 bytes as Q4_0 |
    return (_nibbles(blocks[:, 4:20]).view(-1, 32).float() * _half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | 4 bytes: the fifth bits of 0..31 | 16 bytes as Q4_0 |
    q = _nibbles(blocks[:, 6:22]).view(-1, 32) | (_bits(blocks[:, 2:6]) << 4)
    return (q.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | m: f16 | 4 bytes: the fifth bits | 16 bytes as Q4_0 |
    q = _nibbles(blocks[:, 8:24]).view(-1, 32) | (_bits(blocks[:, 4:8]) << 4)
    return (q.float() * _half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | 32 int8 |
    return blocks[:, 2:34].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima, 6 bits each, of a Q4_K or Q5_K block: `[n, 12]` → two `[n, 8]`.

    Bytes 0..3 hold scales 0..3 in their low 6 bits, bytes 4..7 minima 0..3. Scale 4+i has its low nibble in the low
    nibble of byte 8+i and its high 2 bits atop byte i; minimum 4+i the high nibble there and the 2 bits atop byte 4+i.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | m: f16 | 12 bytes of scales | 4 × 32 bytes: each 32 low nibbles, then 32 high ones |
    scales, minima = _k_scales(blocks[:, 4:16])
    q = _nibbles(blocks[:, 16:144].reshape(-1, 32)).view(-1, 8, 32).float()
    scales, minima = scales * _half(blocks, 0), minima * _half(blocks, 2)
    return (q * scales.unsqueeze(-1) - minima.unsqueeze(-1)).view(-1, 256)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    # | d: f16 | m: f16 | 12 bytes of scales | 32 bytes: bit i is the fifth bit in sub-block i | 4 × 32 bytes as Q4_K |
    scales, minima = _k_scales(blocks[:, 4:16])
    low = _nibbles(blocks[:, 48:176].reshape(-1, 32)).view(-1, 8, 32)
    high = (blocks[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1
    scales, minima = scales * _half(blocks, 0), minima * _half(blocks, 2)
    return ((low | (high << 4)).float() * scales.unsqueeze(-1) - minima.unsqueeze(-1)).view(-1, 256)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    # Two halves of 128 elements, each four rows of 32: rows 0 and 1 are the low nibbles of 64 bytes, 2 and 3 the high
    # ones; the upper 2 bits of row r are bits 2r of 32 further bytes. Then 16 int8 scales (one for 16 elements), d.
    # | 2 × 64 bytes | 2 × 32 bytes | 16 int8 | d: f16 |
    low = _nibbles(blocks[:, 0:128].reshape(-1, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    q = (low | (high << 4)).view(-1, 16, 16).float() - 32
    return (q * scales.unsqueeze(-1)).view(-1, 256)


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
