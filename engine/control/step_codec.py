"""A step's work as one run of bytes: what all ranks of a tensor-parallel engine act on (§4.6).

    counts   int32 [10]     how many there are of each of the following, in this order
    rows     ROW            one a scheduled sequence
    draws    DRAW           one a sample request, those of a sequence in a row
    copies   int32 [n, 2]   blocks to swap out, to swap in, and to copy
    tokens   int32          of all sequences, one after the other
    blocks   int32          their block tables
    history  int32          tokens so far, of the draws that penalise them
    names    int32, utf-8   the distinct request ids: lengths, then text
    params   int32, JSON    the distinct sampling parameters: lengths, then text

Nothing is pickled, and nothing is encoded a token at a time: sampling parameters are turned into text once a request,
the rest are arrays. Little-endian, as all machines are that run this.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.int32_buffer import Int32Array
from engine.memory import BlockCopy
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput

# Sequence, start; how many tokens, blocks and draws.
_ROW = struct.Struct("<qiiii")
# Sequence, seed, cumulative log-probability; which name and parameters; sample index, position, prompt's length; how
# many tokens so far are sent.
_DRAW = struct.Struct("<qQdiiiiii")
_INT32 = np.dtype("<i4")
_NUM_COUNTS = 10
_NO_TOKENS: Int32Array = np.empty(0, dtype=np.int32)

# Parameters kept beyond the requests that still run: enough for any batch, and a bound for a long life.
_REMEMBERED = 8192
_DEFAULTS = {field.name: getattr(SamplingParams(), field.name) for field in dataclasses.fields(SamplingParams)}


class StepEncoder:
    """Encodes steps for all ranks. Remembers the text of each request's sampling parameters."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[SamplingParams, bytes]] = {}

    def encode(self, output: SchedulerOutput) -> bytes:
        """The whole step, but for `token_ids` of draws that penalise no tokens: nothing reads those."""
        scheduled = output.scheduled
        rows = [
            _ROW.pack(item.seq_id, item.start, len(item.token_ids), len(item.block_table), len(item.samples))
            for item in scheduled
        ]
        names: dict[str, int] = {}
        params: dict[bytes, int] = {}
        history: list[Int32Array] = []
        draws = []
        for item in scheduled:
            for request in item.samples:
                penalised = request.sampling_params.has_penalties
                if penalised:
                    history.append(request.token_ids)
                text = self._text(request.request_id, request.sampling_params)
                draws.append(
                    _DRAW.pack(
                        request.seq_id,
                        request.seed,
                        request.cumulative_logprob,
                        names.setdefault(request.request_id, len(names)),
                        params.setdefault(text, len(params)),
                        request.sample_index,
                        request.position,
                        request.num_prompt_tokens,
                        len(request.token_ids) if penalised else 0,
                    )
                )
        copies = (*output.blocks_to_swap_out, *output.blocks_to_swap_in, *output.blocks_to_copy)
        tokens = _joined([item.token_ids for item in scheduled])
        blocks = _joined([item.block_table for item in scheduled])
        past = _joined(history)
        encoded_names = [name.encode("utf-8", "surrogatepass") for name in names]
        counts = [
            len(rows),
            len(draws),
            len(output.blocks_to_swap_out),
            len(output.blocks_to_swap_in),
            len(output.blocks_to_copy),
            len(tokens),
            len(blocks),
            len(past),
            len(encoded_names),
            len(params),
        ]
        return b"".join(
            [
                _int32(counts),
                *rows,
                *draws,
                np.array(copies, dtype=_INT32).tobytes(),
                tokens.tobytes(),
                blocks.tobytes(),
                past.tobytes(),
                _int32([len(name) for name in encoded_names]),
                *encoded_names,
                _int32([len(text) for text in params]),
                *params,
            ]
        )

    def _text(self, request_id: str, params: SamplingParams) -> bytes:
        known = self._texts.get(request_id)
        if known is not None and known[0] is params:
            return known[1]
        if len(self._texts) >= _REMEMBERED:
            self._texts.clear()
        text = _params_text(params)
        self._texts[request_id] = (params, text)
        return text


class StepDecoder:
    """Decodes steps on a rank. Remembers the sampling parameters that it has read."""

    def __init__(self) -> None:
        self._params: dict[bytes, SamplingParams] = {}

    def decode(self, message: bytes) -> SchedulerOutput:
        """The step as its encoder was given it. Arrays are views of `message`."""
        reader = _Reader(message)
        counts = reader.array(_INT32, _NUM_COUNTS).tolist()
        num_rows, num_draws, num_out, num_in, num_copies, num_tokens, num_blocks, num_past = counts[:8]
        num_names, num_params = counts[8:]
        rows = reader.structs(_ROW, num_rows)
        draws = reader.structs(_DRAW, num_draws)
        pairs = reader.array(_INT32, 2 * (num_out + num_in + num_copies)).reshape(-1, 2).tolist()
        copies = tuple(BlockCopy(source, destination) for source, destination in pairs)
        tokens = reader.array(_INT32, num_tokens)
        blocks = reader.array(_INT32, num_blocks)
        past = reader.array(_INT32, num_past)
        names = [str(text, "utf-8", "surrogatepass") for text in reader.texts(num_names)]
        params = [self._params_of(text) for text in reader.texts(num_params)]
        reader.finish()

        samples: list[SampleRequest] = []
        at = 0
        for seq_id, seed, logprob, name, which, index, position, num_prompt, num_history in draws:
            token_ids = past[at : at + num_history] if num_history else _NO_TOKENS
            at += num_history
            samples.append(
                SampleRequest(seq_id, names[name], params[which], seed, index, position, num_prompt, token_ids, logprob)
            )
        scheduled = []
        token = block = draw = 0
        for seq_id, start, count, num_table, num_samples in rows:
            scheduled.append(
                ScheduledSequence(
                    seq_id,
                    start,
                    tokens[token : token + count],
                    blocks[block : block + num_table],
                    tuple(samples[draw : draw + num_samples]) if num_samples else (),
                )
            )
            token, block, draw = token + count, block + num_table, draw + num_samples
        return SchedulerOutput(
            tuple(scheduled), copies[:num_out], copies[num_out : num_out + num_in], copies[num_out + num_in :]
        )

    def _params_of(self, text: bytes) -> SamplingParams:
        params = self._params.get(text)
        if params is None:
            if len(self._params) >= _REMEMBERED:
                self._params.clear()
            params = self._params[text] = _params_from(text)
        return params


class _Reader:
    """Takes arrays and texts from a message in order; ValueError if it is shorter or longer than it says."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    def array(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        found = np.frombuffer(self._message, dtype, count, self._at) if count else np.empty(0, dtype)
        self._at += count * dtype.itemsize
        return found

    def structs(self, layout: struct.Struct, count: int) -> Iterator[tuple[Any, ...]]:
        begin, self._at = self._at, self._at + count * layout.size
        return layout.iter_unpack(memoryview(self._message)[begin : self._at])

    def texts(self, count: int) -> list[bytes]:
        lengths = self.array(_INT32, count).tolist()
        begin = self._at
        ends = list(accumulate(lengths, initial=begin))
        self._at = ends[-1]
        return [self._message[start:end] for start, end in pairwise(ends)]

    def finish(self) -> None:
        if self._at != len(self._message):
            raise ValueError(f"a step's message of {len(self._message)} bytes says that it has {self._at}")


def _joined(arrays: Sequence[Int32Array]) -> Int32Array:
    return np.concatenate(arrays) if arrays else _NO_TOKENS


def _int32(values: Sequence[int]) -> bytes:
    return np.array(values, dtype=_INT32).tobytes()


def _params_text(params: SamplingParams) -> bytes:
    """What differs from the defaults, as JSON; Python's own writes and reads every float exactly."""
    changed: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(params, name)
        if value != default or type(value) is not type(default):
            changed[name] = dict(value) if name == "logit_bias" else value
    return json.dumps(changed, separators=(",", ":")).encode()


def _params_from(text: bytes) -> SamplingParams:
    fields = json.loads(text)
    return SamplingParams(**fields)
