"""Lists of requests, as the peers' scripts read them: `[[prompt_token_ids, output_tokens], ...]` in JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine import LLM, SamplingParams

MEDIAN_TOKENS = (120, 120)  # of a prompt and of an output in a list made here
SINGLE_TOKENS = 128  # what one stream generates, as in the peers' scripts


class Request(NamedTuple):
    """A prompt, and how many tokens are generated whatever they are."""

    prompt: list[int]
    num_output_tokens: int


def read_requests(path: Path) -> list[Request]:
    """Raises ValueError for a file that is no such list."""
    items = json.loads(path.read_text())
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: not a list of requests")
    for index, item in enumerate(items):
        is_pair = isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], int)
        if not is_pair or not item[0] or item[1] < 1:
            raise ValueError(f"{path}: request {index} is not [prompt_token_ids, output_tokens], both above 0 tokens")
    return [Request(prompt, num_output_tokens) for prompt, num_output_tokens in items]


def make_requests(
    count: int, vocab_size: int, max_model_len: int, seed: int = 0, median_tokens: tuple[int, int] = MEDIAN_TOKENS
) -> list[Request]:
    """Random prompts; prompts' and outputs' lengths are log-normal around their medians, none beyond half the model."""
    rng = np.random.default_rng(seed)
    longest = max_model_len // 2
    lengths = np.clip(rng.lognormal(np.log(median_tokens), sigma=0.7, size=(count, 2)), 4, longest).astype(int)
    return [
        Request(rng.integers(0, vocab_size, num_prompt).tolist(), int(num_output)) for num_prompt, num_output in lengths
    ]


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    path.write_text(json.dumps(requests))


def output_rate(llm: LLM, requests: Sequence[Request]) -> float:
    """Output tokens a second, all requests given at once, greedy."""
    params = [
        SamplingParams(max_tokens=request.num_output_tokens, ignore_eos=True, temperature=0.0) for request in requests
    ]
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": request.prompt} for request in requests], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def single_rate(llm: LLM, requests: Sequence[Request]) -> float:
    """Output tokens a second of one stream: the first request's prompt."""
    return output_rate(llm, [Request(requests[0].prompt, SINGLE_TOKENS)])
