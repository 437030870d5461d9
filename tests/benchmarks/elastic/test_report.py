from __future__ import annotations

import math
import warnings
from pathlib import Path

from benchmarks.elastic.report import Run, late_ttft_s, replicas_over_time, summary, timeline
from benchmarks.elastic.workload import ElasticRequest, Prices

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from benchmarks.elastic.least import Least
    from benchmarks.elastic.plot import draw

REQUESTS = [ElasticRequest(1.0 + second, 600, 10) for second in range(8)]
TTFT = [3.0, 0.2, 0.2, math.inf, 0.4, 0.2, math.inf, 0.2]
REFUSED = [False, False, False, True, False, False, False, False]
RUN = Run(REQUESTS, TTFT, REFUSED, [(1.0, 3.5, 10.0), (4.0, math.inf, 6.0)], [(4.0, "Scaling up")])


def test_late_first_tokens() -> None:
    assert late_ttft_s([float(number) for number in range(100)]) == 95.0
    assert late_ttft_s([0.1, math.inf]) == math.inf


def test_a_summary_counts_what_was_refused_and_what_failed() -> None:
    entry = summary(RUN, (2.0, 3.0))
    assert (entry["requests"], entry["refused"], entry["failed"]) == (8, 1, 1)
    assert (entry["first_answer_s"], entry["ttft_p95_s"], entry["ramp_ttft_p95_s"]) == (3.0, None, 0.2)
    assert (entry["replica_s"], entry["max_replicas"], entry["starts"], entry["start_s"]) == (11.0, 2, 2, 2.5)


def test_replicas_over_time() -> None:
    assert replicas_over_time(RUN.lives) == [(0.0, 0), (1.0, 1), (4.0, 2), (6.0, 1), (10.0, 0)]
    assert replicas_over_time(RUN.lives, ready=True) == [(0.0, 0), (3.5, 1), (10.0, 0)]


def test_a_timeline_has_a_step_for_each_piece_of_time() -> None:
    steps = timeline(RUN, 2.0)
    assert [step["requests"] for step in steps] == [1, 2, 2, 2, 1, 0]
    assert [step["refused"] for step in steps] == [0, 0, 1, 0, 0, 0]
    assert [step["replicas"] for step in steps] == [1, 2, 1, 1, 0, 0]
    assert [step["ttft_p95_s"] for step in steps] == [3.0, 0.2, 0.4, 0.2, 0.2, None]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "run.png", RUN, Prices(), 1.0, Least(9.0, [1, 1, 2, 1], 2.0), "a run")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
