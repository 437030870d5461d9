"""Counts of decisions: kept where ingresses read, gone on with by the next controller, never in the policy's way."""

from __future__ import annotations

import logging
import warnings

import pytest

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray.experimental.internal_kv as internal_kv

from app.autoscaling.decision_counts import (
    NO_DECISIONS,
    DecisionCounter,
    decode_counts,
    encode_counts,
    read_decisions,
)


class ControlStore:
    """In place of Ray's."""

    def __init__(self) -> None:
        self.kept: dict[tuple[bytes, bytes], bytes] = {}
        self.gone = False

    def internal_kv_get(self, key: bytes, namespace: bytes) -> bytes | None:
        return self.kept.get((namespace, key))

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> int:
        if self.gone:
            raise ConnectionError("the control store is gone")
        assert overwrite
        self.kept[namespace, key] = value
        return 0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> ControlStore:
    made = ControlStore()
    monkeypatch.setattr(internal_kv, "global_gcs_client", made)
    return made


def test_the_next_controller_goes_on_from_where_the_last_had_come_to(store: ControlStore) -> None:
    first = DecisionCounter()
    first.begin("app", "engine-m")
    assert read_decisions("app", "engine-m") == NO_DECISIONS
    assert read_decisions("app", "engine-fixed") == {}
    first.count("app", "engine-m", "up", "kv")
    second = DecisionCounter()
    second.begin("app", "engine-m")
    second.count("app", "engine-m", "up", "kv")
    second.count("app", "engine-m", "up", "keep")
    assert read_decisions("app", "engine-m") == {**NO_DECISIONS, ("up", "kv"): 2, ("up", "keep"): 1}
    assert {namespace for namespace, _ in store.kept} == {b"quire"}


def test_a_store_that_is_gone_delays_the_figures_and_nothing_else(
    store: ControlStore, caplog: pytest.LogCaptureFixture
) -> None:
    counter = DecisionCounter()
    counter.begin("app", "engine-m")
    store.gone = True
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        counter.count("app", "engine-m", "down", "idle")
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert "the control store is gone" in caplog.text
    store.gone = False
    counter.count("app", "engine-m", "down", "spare")
    found = read_decisions("app", "engine-m")
    assert (found["down", "idle"], found["down", "spare"]) == (1, 1)


def test_without_ray_nothing_is_kept() -> None:
    assert internal_kv.global_gcs_client is None
    counter = DecisionCounter()
    counter.begin("app", "engine-m")
    counter.count("app", "engine-m", "up", "queue")
    assert read_decisions("app", "engine-m") == {}


def test_counts_travel() -> None:
    counts = {("up", "prompts"): 3, ("down", "spare"): 0}
    assert decode_counts(encode_counts(counts)) == counts
