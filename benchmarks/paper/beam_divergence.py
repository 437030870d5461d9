"""How far apart the beams of a search are: of the embedded model on the real engine, and of the simulated language.

    python -m benchmarks.paper.beam_divergence [--prompts N] [--tokens N] [--out FILE]

Fig. 14 and Fig. 15 rest on it: what a search saves by sharing depends on how early its live beams part. Prints a table;
the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.real import MODEL, SOURCE, num_threads
from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.execution.executor import Executor
from engine.execution.hardware import find_hardware
from engine.execution.simulated import VirtualClock, build_simulated_engine
from engine.execution.simulated_tokens import SimulatedLanguage
from engine.int32_buffer import Int32Array
from engine.preemption import SwapCost
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.scheduling import SamplerOutput, SchedulerOutput

WIDTHS = (2, 4, 6)
BLOCK_SIZE = 16
# Instructions like Alpaca's, written for this measurement; the model sees them as they stand, like the paper's OPT.
PROMPTS = (
    "Give three tips for staying healthy.",
    "Explain why the sky is blue to a child of six.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Describe the structure of an atom.",
    "How can a small town reduce the amount of waste that it produces?",
    "Suggest a menu for a dinner with four guests, one of whom eats no meat.",
    "Summarize the causes of the First World War in a few sentences.",
    "What is the difference between weather and climate?",
    "Write an email to a landlord who has not repaired the heating for two weeks.",
    "List five books about the sea and say in a sentence what each is about.",
    "Compare the advantages of trains and aeroplanes for a journey of 600 kilometres.",
    "Propose a name for a shop that sells old bicycles, and explain it.",
    "Rewrite this sentence in a friendlier tone: You are late again.",
    "Describe a typical day of a nurse in a large hospital.",
    "Explain how a bill becomes a law in the United States.",
    "Write a poem about the first snow of the year.",
)


@dataclass
class Divergence:
    """What the live beams of all searches of one width have in common, by number of generated tokens.

    Attributes:
        saved: share of the searches' blocks that sharing saves, in each step that draws token 2, 3, ...
        ancestor_age: tokens since the last that all beams have in common.
        same_parent: share of the searches in which beams that come from one parent replaced another's, in that step.
    """

    saved: list[float] = field(default_factory=list)
    ancestor_age: list[float] = field(default_factory=list)
    same_parent: list[float] = field(default_factory=list)

    def saved_until(self, num_tokens: int) -> float:
        """Per cent saved over the life of a search that generates so many tokens, all steps alike."""
        return 100.0 * float(np.mean(self.saved[:num_tokens]))


class _Recorder(Executor):
    """An Executor that notes the live beams of each step, and leaves the rest to another."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.steps: list[dict[str, list[Int32Array]]] = []

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        searches: dict[str, list[Int32Array]] = {}
        for item in output.scheduled:
            for sample in item.samples:
                searches.setdefault(sample.request_id, []).append(sample.token_ids.copy())
        self.steps.append(searches)
        return self._inner.execute(output)

    def swap_cost(self) -> SwapCost | None:
        return self._inner.swap_cost()


def measure(engine: LLMEngine, prompts: Sequence[Sequence[int]], width: int, num_tokens: int) -> Divergence:
    """Search for continuations of all prompts together, all of the same length."""
    recorder = _Recorder(engine._executor)
    engine._executor = recorder
    params = SamplingParams(
        best_of=width, use_beam_search=True, temperature=0.0, max_tokens=num_tokens, ignore_eos=True
    )
    for index, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(f"{width}-{index}", prompt, params))
    while engine.has_unfinished_requests:
        engine.step()
    by_age: dict[int, list[tuple[float, float, float]]] = {}
    for searches in recorder.steps:
        for name, beams in searches.items():
            if len(beams) < width:
                continue  # the prompt's own step, which draws the first beams
            start = len(prompts[int(name.split("-")[1])])
            by_age.setdefault(len(beams[0]) - start, []).append(_compare(np.stack(beams)))
    result = Divergence()
    for _, rows in sorted(by_age.items()):
        for values, mean in zip(
            (result.saved, result.ancestor_age, result.same_parent), np.mean(rows, axis=0).tolist(), strict=True
        ):
            values.append(mean)
    return result


def _compare(beams: Int32Array) -> tuple[float, float, float]:
    """Saved share of blocks, age of the common ancestor, and whether some beams have one parent; `[width, tokens]`."""
    width, length = beams.shape
    ends = range(BLOCK_SIZE, length, BLOCK_SIZE)
    # Beams with the same tokens up to a block's end come from one ancestor, and share the block; each writes to its own
    # last one.
    distinct = sum(len(np.unique(beams[:, :end], axis=0)) for end in ends) + width
    saved = 1.0 - distinct / (width * (len(ends) + 1))
    common = int((beams == beams[0]).all(axis=0).cumprod().sum())
    return saved, float(length - common), float(len(np.unique(beams[:, :-1], axis=0)) < width)


def real_engine() -> LLMEngine:
    options = {"num_threads": num_threads(), "block_size": BLOCK_SIZE, "num_blocks": 2048, "max_model_len": 512}
    return LLMEngine.from_options(SOURCE, EngineConfig.from_dict({**options, "enable_prefix_caching": False}))


def simulated_engine(language: SimulatedLanguage, like: LLMEngine) -> LLMEngine:
    """The same engine over a simulated device that speaks `language`."""
    hardware = find_hardware("a100-40gb")
    return build_simulated_engine(like.model_config, hardware, like.config, VirtualClock(), language)[0]


def _table(measured: Mapping[str, Mapping[int, Divergence]], lengths: Sequence[int]) -> str:
    lines = ["| beams of | width | " + " | ".join(f"saved by {count} tokens" for count in lengths)]
    lines[0] += " | median age of the ancestor | steps in which beams share a parent |"
    lines.append("|---" * (len(lengths) + 4) + "|")
    for who, widths in measured.items():
        for width, item in widths.items():
            shares = " | ".join(f"{item.saved_until(count):.1f} %" for count in lengths)
            age, parent = float(np.median(item.ancestor_age)), 100 * float(np.mean(item.same_parent))
            lines.append(f"| {who} | {width} | {shares} | {age:.1f} | {parent:.0f} % |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.paper.beam_divergence", description="How beams diverge")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1), metavar="N")
    parser.add_argument("--tokens", type=int, default=256, choices=range(8, 401), metavar="N")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args(arguments)
    engine = real_engine()
    assert engine.tokenizer is not None, f"{MODEL} has a tokenizer"
    prompts = [engine.tokenizer.encode(text) for text in PROMPTS[: options.prompts]]
    model = engine.model_config
    simulated = simulated_engine(SimulatedLanguage(model.vocab_size, model.eos_token_ids), engine)
    measured = {
        name: {width: measure(item, prompts, width, options.tokens) for width in WIDTHS}
        for name, item in ((MODEL, engine), ("the simulated language", simulated))
    }
    lengths = [count for count in (16, 32, 64, 128, 256, 400) if count <= options.tokens]
    table = _table(measured, lengths)
    print(table)
    if options.out is not None:
        options.out.write_text(table + "\n", encoding="utf-8")
    data: dict[str, Any] = {
        name: {str(width): {str(count): item.saved_until(count) for count in lengths} for width, item in widths.items()}
        for name, widths in measured.items()
    }
    print(json.dumps({"benchmark": "beam_divergence", "saved_percent": data}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
