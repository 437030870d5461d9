"""A step's work as one run of bytes: what all ranks of a tensor-parallel engine act on (§4.6).

    counts   int32 [8]      how many there are of each of the following; of copies, to swap out, to swap in, to copy
    rows     int64 [6, n]   of each scheduled sequence: its id, start, how many tokens and blocks, whether it draws, and
                            its adapter's slot
    copies   int32 [n, 2]   blocks to swap out, to swap in, and to copy
    tokens   int32 [n]      of all sequences, one after the other
    blocks   int32 [n]      their block tables
    drops    int32 [n]      slots of adapters to empty
    loads    UTF-8 [n]      slots to fill: JSON, a list of slot, name and source; each rank has prepared its own part

Rank 0 draws alone. The others compute their part of the logits, for which they need to know of which rows, and nothing
of who asked for them and how they are to be drawn from.

Nothing is pickled, nothing is encoded a token at a time, and each array is copied once. Little-endian, as all machines
are that run this.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.adapters import NO_CHANGES, AdapterChanges, AdapterLoad, LoraAdapter
from engine.int32_buffer import Int32Array
from engine.memory import BlockCopy
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput

_INT32, _INT64, _BYTE = np.dtype("<i4"), np.dtype("<i8"), np.dtype("u1")
_NUM_COUNTS, _ROW_FIELDS = 8, 6
_NO_TOKENS: Int32Array = np.empty(0, dtype=np.int32)

# What a rank other than 0 finds as the draws of a row whose logits it helps to compute.
DRAWN_BY_RANK_0 = (SampleRequest(-1, "", SamplingParams(), 0, 0, 0, 0, _NO_TOKENS, 0.0),)


def encode_step(output: SchedulerOutput) -> bytes:
    """The step for the ranks that do not draw."""
    drops, loads = output.adapters
    orders = json.dumps([(load.slot, load.adapter.name, load.adapter.source) for load in loads]) if loads else ""
    text = orders.encode()
    columns = zip(*output.scheduled, strict=True) if output.scheduled else ((),) * 6
    seq_ids, starts, tokens, blocks, samples, slots = columns
    token_counts, block_counts = list(map(len, tokens)), list(map(len, blocks))
    rows = array("q", (*seq_ids, *starts, *token_counts, *block_counts, *map(bool, samples), *slots))
    copies = (*output.blocks_to_swap_out, *output.blocks_to_swap_in, *output.blocks_to_copy)
    counts = (
        len(seq_ids),
        len(output.blocks_to_swap_out),
        len(output.blocks_to_swap_in),
        len(output.blocks_to_copy),
        sum(token_counts),
        sum(block_counts),
        len(drops),
        len(text),
    )
    pairs = array("i", chain.from_iterable(copies))
    return b"".join((array("i", counts), rows, pairs, *tokens, *blocks, array("i", drops), text))


def decode_step(message: bytes, take_adapter: Callable[[str, str], tuple[LoraAdapter, object]]) -> SchedulerOutput:
    """The step as a rank other than 0 runs it, with DRAWN_BY_RANK_0 for what is drawn. Arrays are views of `message`.

    Args:
        take_adapter: gives this rank's part of an adapter by its name and source, and what was made of it beforehand.

    Raises:
        ValueError: the message is shorter or longer than it says.
    """
    reader = _Reader(message)
    counts = reader.array(_INT32, _NUM_COUNTS).tolist()
    num_rows, num_out, num_in, num_copies, num_tokens, num_blocks, num_drops, num_text = counts
    rows = reader.array(_INT64, _ROW_FIELDS * num_rows).reshape(_ROW_FIELDS, num_rows)
    pairs = reader.array(_INT32, 2 * (num_out + num_in + num_copies)).reshape(-1, 2).tolist()
    tokens = reader.array(_INT32, num_tokens)
    blocks = reader.array(_INT32, num_blocks)
    drops = reader.array(_INT32, num_drops).tolist()
    text = reader.array(_BYTE, num_text).tobytes()
    reader.finish()
    seq_ids, starts, token_counts, block_counts, draws, slots = rows.tolist()
    columns = (
        seq_ids,
        starts,
        _parts(tokens, token_counts),
        _parts(blocks, block_counts),
        [DRAWN_BY_RANK_0 if draw else () for draw in draws],
        slots,
    )
    scheduled = tuple(map(ScheduledSequence._make, zip(*columns, strict=True)))
    copies = tuple(BlockCopy(source, destination) for source, destination in pairs)
    orders = json.loads(text) if text else ()
    loads = tuple(AdapterLoad(slot, *take_adapter(name, source)) for slot, name, source in orders)
    return SchedulerOutput(
        scheduled,
        copies[:num_out],
        copies[num_out : num_out + num_in],
        copies[num_out + num_in :],
        AdapterChanges(tuple(drops), loads) if drops or loads else NO_CHANGES,
    )


class _Reader:
    """Takes arrays from a message in order."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    def array(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        found = np.frombuffer(self._message, dtype, count, self._at) if count else np.empty(0, dtype)
        self._at += count * dtype.itemsize
        return found

    def finish(self) -> None:
        if self._at != len(self._message):
            raise ValueError(f"a step's message of {len(self._message)} bytes says that it has {self._at}")


def _parts(joined: Int32Array, lengths: Iterable[int]) -> list[Int32Array]:
    return [joined[begin:end] for begin, end in pairwise(accumulate(lengths, initial=0))]
