"""Quire on a GPU, in one visit: checks every kernel, times kernels and peers, and serves models with random weights.

    python -m benchmarks.gpu [--only checks kernels engine] [--models llama-3-8b opt-13b] [--batch 256]
                             [--prompt-tokens 256] [--output-tokens 128]

Bandwidth and matrix rate are measured in the same run. What a peer cannot do, or that it is not there, is named in the
table. The last line is one JSON object. Parts that a time limit cuts off leave those before them printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.cpu.options import positive
from benchmarks.gpu.results import Missing, Rates, Timing, timing_lines, timings_json

PARTS = ("checks", "kernels", "engine")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device, and torch finds none on this machine")
    from benchmarks.gpu.timer import measure_rates
    from engine.kernels import select_backend

    rates = measure_rates()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {rates.copy_bytes_per_s / 1e9:.0f} GB/s, "
        f"to the host {rates.to_host_bytes_per_s / 1e9:.1f}, from it {rates.to_device_bytes_per_s / 1e9:.1f}; "
        f"bfloat16 products {rates.flops_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    kernels = select_backend("auto", "cuda", 0)
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": kernels.name,
        "rates": rates._asdict(),
    }
    if "checks" in options.only:
        result["checks"] = _check(kernels)
    if "kernels" in options.only:
        result |= _time(kernels, rates)
    if "engine" in options.only:
        result["engine"] = _serve(options, rates)
    print(json.dumps(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "opt-13b"])
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--prompt-tokens", type=positive, default=256)
    parser.add_argument("--output-tokens", type=positive, default=128)
    return parser.parse_args(arguments)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines."""


def _check(kernels: Any) -> list[dict[str, object]]:
    from benchmarks.gpu.checks import run_checks

    checks = run_checks(kernels, getattr(kernels, "cuda_only", None))
    for check in checks:
        print(f"{check.name:44} error {check.error:.2e} {'' if check.passes else 'WRONG'}".rstrip(), flush=True)
    return [{"name": check.name, "error": check.error, "passes": check.passes} for check in checks]


def _time(kernels: Any, rates: Rates) -> dict[str, object]:
    from benchmarks.gpu.kernels import time_attention, time_blocks, time_dense, time_sampling

    cuda_only = getattr(kernels, "cuda_only", None)
    found: list[Timing | Missing] = [*time_attention(kernels), *time_dense(kernels), *time_blocks(kernels, cuda_only)]
    if cuda_only is not None:
        found += time_sampling(cuda_only)
    timings = [item for item in found if isinstance(item, Timing)]
    missing = [item for item in found if isinstance(item, Missing)]
    print("\n".join(timing_lines(timings, missing, rates)), flush=True)
    return timings_json(timings, missing, rates)


def _serve(options: argparse.Namespace, rates: Rates) -> list[dict[str, object]]:
    from benchmarks.gpu.serving import ServingResult, measure_quire, measure_transformers

    results = []
    for model in options.models:
        sizes = (options.batch, options.prompt_tokens, options.output_tokens)
        for item in (measure_quire(model, rates, *sizes), measure_transformers(model, *sizes)):
            results.append(item._asdict())
            if isinstance(item, ServingResult):
                line = f"{item.model} {item.by}: {item.tokens_per_s:.0f} tokens/s at batch {item.batch}"
                if item.single_step_s:
                    line += (
                        f"; one sequence {item.single_step_s * 1e3:.2f} ms a step, "
                        f"{item.single_step_s / item.weights_s:.2f} x reading the weights; the device computes "
                        f"{item.device_share:.1%} of a step"
                    )
                print(f"{line}; loaded in {item.load_s:.0f} s", flush=True)
            else:
                print(f"{item.name} {item.by}: {item.reason}", flush=True)
    return results


if __name__ == "__main__":
    main()
