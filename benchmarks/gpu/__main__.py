"""Quire on a GPU, in one visit: checks every kernel, times kernels and peers, and serves models with random weights.

    python -m benchmarks.gpu [--only checks attention dense adapters sampling blocks invariance engine quantized]
                             [--models llama-3-8b opt-13b] [--batch 256] [--prompt-tokens 256] [--output-tokens 128]

Bandwidth and matrix rate are measured in the same run. Lines that begin with "=" are figures, beside the target where
there is one. What a peer cannot do, or that it is not there, is named in the table. Each part prints a line of JSON at
its end, and a part that fails says why and leaves the others; the last line is one JSON object with all of it.
`python -m benchmarks.gpu.visit` runs the tests and all parts within the time limits of a visit.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cpu.options import positive
from benchmarks.gpu.figures import Figure, attention_figures, block_figures
from benchmarks.gpu.results import TABLE_HEADER, Missing, Rates, Timing, timing_line, timings_json

Json = dict[str, Any]


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
    result: Json = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": kernels.name,
        "rates": rates._asdict(),
    }
    print(f"kernels: {kernels.name}", flush=True)
    failed = run_parts({name: PARTS[name] for name in options.only}, result, kernels, rates, options)
    print(json.dumps(result), flush=True)
    sys.exit(1 if failed else 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "opt-13b"])
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="of attention: those whose name has one of these in it"
    )
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--prompt-tokens", type=positive, default=256)
    parser.add_argument("--output-tokens", type=positive, default=128)
    return parser.parse_args(arguments)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines."""


Part = Callable[[Any, Rates, argparse.Namespace], Json]


def run_parts(
    parts: dict[str, Part], result: Json, kernels: Any, rates: Rates, options: argparse.Namespace
) -> list[str]:
    """Run each part into `result`, whatever the others do; the names of those that failed."""
    failed = []
    for name, part in parts.items():
        try:
            result[name] = part(kernels, rates, options)
        except Exception as error:  # a fault in one part must not cost the figures of the others
            traceback.print_exc(file=sys.stdout)
            result[name] = {"failed": f"{type(error).__name__}: {error}"}
            failed.append(name)
            print(f"{name} FAILED: {type(error).__name__}: {error}", flush=True)
        print(json.dumps({"benchmark": "gpu", "part": name, name: result[name]}), flush=True)
    return failed


def _check(kernels: Any, _rates: Rates, _options: argparse.Namespace) -> Json:
    from benchmarks.gpu.checks import Check, run_checks

    checks: list[Check] = []
    for check in run_checks(kernels, getattr(kernels, "cuda_only", None)):
        print(f"{check.name:44} error {check.error:.2e} {'' if check.passes else 'WRONG'}".rstrip(), flush=True)
        checks.append(check)
    share = sum(check.passes for check in checks) / len(checks)
    return {
        "checks": [{"name": check.name, "error": check.error, "passes": check.passes} for check in checks],
        "figures": _show([Figure("share of kernel checks against float32 that pass", share, least=1.0)]),
    }


def _time_attention(kernels: Any, rates: Rates, options: argparse.Namespace) -> Json:
    from benchmarks.gpu.attention import CASES
    from benchmarks.gpu.kernels import time_attention
    from engine.kernels.cuda import CudaBackend

    cases = tuple(case for case in CASES if any(part in case.name for part in options.cases))
    fixed = CudaBackend(batch_invariant=True) if isinstance(kernels, CudaBackend) else None
    items = _table(time_attention(kernels, cases, fixed), rates)
    timings = [item for item in items if isinstance(item, Timing)]
    missing = [item for item in items if isinstance(item, Missing)]
    return timings_json(items, rates) | {"figures": _show(attention_figures(timings, missing, rates))}


def _time_dense(kernels: Any, rates: Rates, _options: argparse.Namespace) -> Json:
    from benchmarks.gpu.kernels import time_dense

    return timings_json(_table(time_dense(kernels), rates), rates)


def _time_adapters(_kernels: Any, rates: Rates, _options: argparse.Namespace) -> Json:
    from benchmarks.gpu.adapters import time_adapters

    return timings_json(_table(time_adapters(), rates), rates)


def _time_sampling(kernels: Any, rates: Rates, _options: argparse.Namespace) -> Json:
    from benchmarks.gpu.kernels import time_sampling

    if (cuda_only := getattr(kernels, "cuda_only", None)) is None:
        return {"missing": f"kernels={kernels.name} draw on the host"}
    return timings_json(_table(time_sampling(cuda_only), rates), rates)


def _time_blocks(kernels: Any, rates: Rates, _options: argparse.Namespace) -> Json:
    from benchmarks.gpu.kernels import time_blocks

    items = _table(time_blocks(kernels, getattr(kernels, "cuda_only", None)), rates)
    timings = [item for item in items if isinstance(item, Timing)]
    return timings_json(items, rates) | {"figures": _show(block_figures(timings, rates))}


def _check_invariance(_kernels: Any, _rates: Rates, options: argparse.Namespace) -> Json:
    from benchmarks.gpu.invariance import same_attention, same_logits
    from engine.kernels import select_backend

    kernels = select_backend("auto", "cuda", 0, batch_invariant=True)
    figures = _show(
        [Figure("attention rows that are the same bits alone, in a batch and in chunks", same_attention(kernels), 1.0)]
    )
    for model in options.models:
        share = same_logits(model, kernels)
        figures += _show(
            [Figure(f"sequences whose logits are the same bits alone and in a batch ({model})", share, 1.0)]
        )
    return {"kernels": kernels.name, "figures": figures}


def _serve(_kernels: Any, rates: Rates, options: argparse.Namespace) -> Json:
    from benchmarks.gpu.serving import serve_model

    return _serve_by(serve_model, rates, options)


def _serve_quantized(_kernels: Any, rates: Rates, options: argparse.Namespace) -> Json:
    from benchmarks.gpu.serving import serve_quantized

    return _serve_by(serve_quantized, rates, options)


def _serve_by(serve: Any, rates: Rates, options: argparse.Namespace) -> Json:
    results: list[object] = []
    figures: list[Json] = []
    for model in options.models:
        for item in serve(model, rates, options.batch, options.prompt_tokens, options.output_tokens):
            if isinstance(item, Figure):
                figures += _show([item])
                continue
            results.append(item._asdict())
            print(item.line(), flush=True)
    return {"results": results, "figures": figures}


def _table(items: Any, rates: Rates) -> list[Timing | Missing]:
    print(TABLE_HEADER, flush=True)
    kept = []
    for item in items:
        print(timing_line(item, rates), flush=True)
        kept.append(item)
    return kept


def _show(figures: Any) -> list[Json]:
    kept = []
    for figure in figures:
        print(figure.line(), flush=True)
        kept.append(figure.json())
    return kept


PARTS: dict[str, Part] = {
    "checks": _check,
    "attention": _time_attention,
    "dense": _time_dense,
    "adapters": _time_adapters,
    "sampling": _time_sampling,
    "blocks": _time_blocks,
    "invariance": _check_invariance,
    "engine": _serve,
    "quantized": _serve_quantized,
}


if __name__ == "__main__":
    main()
