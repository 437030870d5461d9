"""All that wants a GPU, in four commands of under ten minutes: `python -m benchmarks.gpu.visit 1`, then 2 to 4.

    python -m benchmarks.gpu.visit STAGE [--limit 570] [--out FOLDER]

1: the library, tests and checks; compute-sanitizer. 2: kernels beside their peers, and batch invariance. 3: whole
models beside transformers, and a profile of one kernel. 4: 8-bit weights beside 16-bit ones. Each step is a process of
its own with a time limit, so that one that fails or hangs costs no other: a fault leaves a process without its GPU.
What a step prints is passed on as it comes, and kept in FOLDER/STEP.log; the last line is one JSON object with how each
step ended and the JSON that it printed last. The stages need nothing of one another but the library, which any of them
builds where it is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks.cpu.options import positive

ROOT = Path(__file__).parents[2]
LIBRARY_FOLDER = ROOT / "build" / "gpu" / "lib"


class Step(NamedTuple):
    """A command, and the seconds that it may take. `needs` is a program without which it is left out."""

    name: str
    command: Sequence[str]
    limit_s: int
    needs: str | None = None


def steps_of(stage: int) -> list[Step]:
    python, bench = sys.executable, [sys.executable, "-m", "benchmarks.gpu"]
    # The machine's own pytest and packages: their warnings are no failures, nor is an older pytest.
    pytest = [python, "-m", "pytest", "-q", "-o", "minversion=7.0", "-W", "default", "-p", "no:cacheprovider"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of the time goes into compiling Triton's
    small = "cuda and (borders or no_sequence or window or round_trip)"
    small_tests = [f"tests/gpu/test_{name}.py" for name in ("matrix_attention", "attention", "swap_blocks")]

    def sanitize(tool: str, limit_s: int) -> Step:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *pytest, "-x", "-m", "gpu"]
        return Step(f"sanitizer-{tool}", [*command, "-k", small, *small_tests], limit_s, "compute-sanitizer")

    if stage == 1:
        return [
            Step("checks", [*bench, "--only", "checks"], 120),
            Step("tests", [*pytest, "--tb=short", *workers, "-m", "gpu and not slow", "tests/gpu"], 300),
            sanitize("memcheck", 120),
            sanitize("racecheck", 120),
        ]
    if stage == 2:
        return [
            Step("blocks", [*bench, "--only", "blocks", "sampling", "dense", "adapters"], 180),
            Step("attention", [*bench, "--only", "attention"], 330),
            Step("invariance", [*bench, "--only", "invariance", "--models", "llama-3-8b"], 150),
        ]
    if stage == 4:
        return [
            Step("llama-quantized", [*bench, "--only", "quantized", "--models", "llama-3-8b"], 300),
            Step("opt-quantized", [*bench, "--only", "quantized", "--models", "opt-13b"], 300),
        ]
    metrics = ["--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy"]
    profiled = ["--kernel-name", "regex:decode_attention", "--launch-skip", "40", "--launch-count", "1", *metrics]
    one_case = [*bench, "--only", "attention", "--cases", "decode llama-8b 16"]
    return [
        Step("llama", [*bench, "--only", "engine", "--models", "llama-3-8b"], 300),
        Step("profile", ["ncu", "--clock-control", "none", *profiled, *one_case], 120, "ncu"),
        Step("opt", [*bench, "--only", "engine", "--models", "opt-13b"], 240),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.visit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("--limit", type=positive, default=570, help="seconds for the whole stage")
    parser.add_argument("--out", type=Path, help="a folder for the steps' logs")
    options = parser.parse_args(arguments)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + options.limit
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    results: list[dict[str, Any]] = []
    build = library_step(environment)
    for step in [*([build] if build is not None else []), *steps_of(options.stage)]:
        results.append(run_step(step, ends_at, environment, options.out))
        print(json.dumps({"visit": options.stage, **results[-1]}), flush=True)
        if step is build and results[-1]["ended"] == "0":
            environment["QUIRE_LIBRARY_PATH"] = str(LIBRARY_FOLDER)
    print(json.dumps({"benchmark": "gpu visit", "stage": options.stage, "steps": results}), flush=True)


def library_step(environment: dict[str, str]) -> Step | None:
    """What builds the CUDA library, if there is none; sets the environment to where one was built before."""
    if "QUIRE_LIBRARY_PATH" not in environment and (LIBRARY_FOLDER / "libquire_cuda.so").is_file():
        environment["QUIRE_LIBRARY_PATH"] = str(LIBRARY_FOLDER)
    carried = Path(environment.get("QUIRE_LIBRARY_PATH", ROOT / "engine" / "kernels" / "lib"))
    if (carried / "libquire_cuda.so").is_file():
        return None
    configure = (
        f"cmake -S csrc -B build/gpu -DCMAKE_BUILD_TYPE=Release -DQUIRE_CUDA=ON -DQUIRE_LIBRARY_DIR={LIBRARY_FOLDER}"
    )
    build = f"cmake --build build/gpu --target quire_cuda -j {os.cpu_count()}"
    return Step("build", ["sh", "-c", f"{configure} && {build}"], 200, "nvcc")


def run_step(step: Step, ends_at: float, environment: dict[str, str], out: Path | None) -> dict[str, Any]:
    """Run one step within its limit and the stage's; how it ended ("0" is well), and the JSON that it printed last."""
    began = time.monotonic()
    limit_s = min(step.limit_s, ends_at - began)
    print(f"==== {step.name}, up to {max(0.0, limit_s):.0f} s", flush=True)
    found: dict[str, Any] = {}

    def result(ended: str) -> dict[str, Any]:
        return {"step": step.name, "ended": ended, "seconds": round(time.monotonic() - began, 1), **found}

    if step.needs is not None and shutil.which(step.needs) is None:
        return result(f"left out: there is no {step.needs}")
    if limit_s < 2:
        return result("left out: the stage's time is over")
    log = (out / f"{step.name}.log").open("w") if out is not None else None
    try:
        process = subprocess.Popen(
            list(step.command), cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        return result(f"could not be started: {error}")
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, log, found), daemon=True)
    reader.start()
    try:
        ended = str(process.wait(limit_s))
    except subprocess.TimeoutExpired:
        ended = f"cut off after {limit_s:.0f} s"
        os.killpg(process.pid, 9)  # what it started, too
        process.wait()
    reader.join()
    if log is not None:
        log.close()
    return result(ended)


def _pass_on(stream: TextIO, log: TextIO | None, found: dict[str, Any]) -> None:
    """Print lines as they come; keep figures, the latest JSON object, and pytest's last count."""
    for line in iter(stream.readline, ""):
        if line.startswith("{") and line.rstrip().endswith("}"):
            try:
                found["json"] = json.loads(line)
            except json.JSONDecodeError:
                print(line, end="", flush=True)
        else:
            print(line, end="", flush=True)
            if line.startswith("= "):
                found.setdefault("figures", []).append(line[2:].strip())
            elif " passed" in line or " failed" in line:
                found["tests"] = line.strip()
        if log is not None:
            log.write(line)
            log.flush()
    stream.close()


if __name__ == "__main__":
    main()
