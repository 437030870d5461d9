"""The operations in plain torch: what every other backend must agree with.

Any device and any floating type. Arithmetic is float32 (float64 for float64 inputs, which the tests use as the exact
answer) and each result is rounded once, when it is stored.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.kernels.backend import AttentionMetadata


class ReferenceBackend:
    """KernelBackend in plain torch, written to be read."""

    name = "reference"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = _widen(x)
        variance = wide.square().mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(variance + eps) * _widen(weight)).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        residual.copy_(_widen(residual) + _widen(x))
        return self.rms_norm(residual, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = _widen(gate_up).chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(gate_up.dtype)

    def rotate_and_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        if cos_sin is not None:
            cos, sin = cos_sin[metadata.positions].unsqueeze(1).chunk(2, dim=-1)
            for heads in (query, key):
                first, second = _widen(heads).chunk(2, dim=-1)
                heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))

        tokens = (metadata.slot_mapping >= 0).nonzero().squeeze(1)
        slots = metadata.slot_mapping[tokens]
        block_size = key_cache.shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        key_cache[blocks, :, offsets] = key[tokens].to(key_cache.dtype)
        value_cache[blocks, :, offsets] = value[tokens].to(value_cache.dtype)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)  # rows of no sequence stay zero
        group = query.shape[1] // key_cache.shape[1]
        block_size = key_cache.shape[2]
        starts = metadata.query_start_loc.tolist()
        for i, seq_len in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            num_rows = rows.stop - rows.start
            if num_rows == 0:
                continue
            blocks = metadata.block_tables[i, : -(-seq_len // block_size)].long()
            keys = _gather(key_cache, blocks, seq_len, group)
            values = _gather(value_cache, blocks, seq_len, group)

            behind = torch.arange(seq_len - num_rows, seq_len, device=query.device).unsqueeze(1) - torch.arange(
                seq_len, device=query.device
            )  # how far each cached token lies behind each row
            hidden = behind < 0
            if sliding_window is not None:
                hidden |= behind >= sliding_window
            scores = _widen(query[rows]).transpose(0, 1) @ keys.transpose(1, 2) * scale
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            out[rows] = (weights @ values).transpose(0, 1).to(query.dtype)
        return out

    def copy_blocks(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        for source, destination in pairs.tolist():
            kv_pool[destination].copy_(kv_pool[source])


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gather(cache: torch.Tensor, blocks: torch.Tensor, seq_len: int, group: int) -> torch.Tensor:
    """One sequence's K or V as `[num_heads, seq_len, head_dim]`, each KV head repeated for its group."""
    num_kv_heads, head_dim = cache.shape[1], cache.shape[3]
    tokens = cache[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :seq_len]
    return _widen(tokens).repeat_interleave(group, dim=0)
