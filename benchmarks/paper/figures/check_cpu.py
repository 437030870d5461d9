"""The simulation checked: one trace on the real CPU engine, and on a device simulated after a fit to this CPU."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Context, Figure, Outcome, Row
from benchmarks.paper.real import MODEL, SmallPool, make_real_engine, replay_real, sampling
from benchmarks.paper.replay import Replay, replay
from benchmarks.paper.traces import DrawnLengths, LogNormal, poisson_trace
from engine.execution.hardware import Hardware
from engine.execution.simulated import VirtualClock, build_simulated_engine
from engine.execution.simulated_fit import fit_hardware

_POOL = SmallPool(2048, 16)
_LENGTHS = DrawnLengths("Alpaca", LogNormal(19.31, 0.5, 240), LogNormal(58.45, 0.8, 240))
_RATES = (0.5, 1.0, 2.0, 4.0)
_QUICK_RATES = (2.0,)


class _Pair(NamedTuple):
    rate: float
    real: Replay
    simulated: Replay

    @property
    def ratio(self) -> float:
        return self.simulated.mean_normalized_latency / self.real.mean_normalized_latency


def run(context: Context) -> Outcome:
    quick = context.scale.quick
    engine = make_real_engine(_POOL)
    hardware = fit_hardware(engine, "this-cpu", element_bytes=4)
    pairs = []
    for rate in _QUICK_RATES if quick else _RATES:
        trace = poisson_trace(_LENGTHS, rate, 3.0 if quick else 25.0, seed=0)
        clock = VirtualClock()
        simulated_engine, _ = build_simulated_engine(engine.model_config, hardware, engine.config, clock)
        pairs.append(_Pair(rate, replay_real(engine, trace), replay(simulated_engine, clock, trace, sampling)))
    rows = [
        Row(
            f"{pair.rate:g} requests/s: normalized latency, simulated over real",
            "x",
            pair.ratio,
            note=f"{pair.simulated.mean_normalized_latency:.3f} and {pair.real.mean_normalized_latency:.3f} s/token",
        )
        for pair in pairs
    ]
    notes = [f"{MODEL} in float32; {_LENGTHS.description}.", _describe(hardware)]
    data = {
        f"{pair.rate:g}": {
            "real": pair.real.mean_normalized_latency,
            "simulated": pair.simulated.mean_normalized_latency,
            "real_steps": pair.real.num_steps,
            "simulated_steps": pair.simulated.num_steps,
        }
        for pair in pairs
    }
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, pairs))


def _describe(hardware: Hardware) -> str:
    return (
        f"This CPU ({hardware.source}): {hardware.matrix_flops / 1e9:.0f} GFLOP/s, weights at "
        f"{hardware.memory_bandwidth / 1e9:.1f} GB/s, KV cache at {hardware.kv_bandwidth / 1e9:.1f} GB/s, "
        f"{1e3 * hardware.sequence_s:.1f} ms a sequence."
    )


def _draw(drawing: Drawing, pairs: list[_Pair]) -> None:
    drawing.set_size_inches(6, 4)
    axes = drawing.add_subplot()
    rates = [pair.rate for pair in pairs]
    axes.plot(rates, [pair.real.mean_normalized_latency for pair in pairs], "o-", label="real")
    axes.plot(rates, [pair.simulated.mean_normalized_latency for pair in pairs], "s--", label="simulated")
    axes.set(xlabel="requests/s", ylabel="normalized latency (s/token)", ylim=(0, None))
    axes.legend()


FIGURE = Figure("check", "The simulation against the real CPU engine", run)
