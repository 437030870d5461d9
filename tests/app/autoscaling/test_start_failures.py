"""Notes of failed starts: counted for ever, with the reason of the last one until a start goes well."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray.experimental.internal_kv as internal_kv

from app.autoscaling.start_failures import StartFailures, note_failed_start, note_start, read_start_failures
from tests.app.autoscaling.test_decision_counts import ControlStore


def test_what_a_replica_leaves_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ControlStore()
    monkeypatch.setattr(internal_kv, "global_gcs_client", store)
    note_start("app", "engine-m")
    assert not store.kept, "nothing to take back"
    note_failed_start("app", "engine-m", RuntimeError("no such file\n  or folder"))
    note_failed_start("app", "engine-m", KeyError())
    assert read_start_failures("app", "engine-m") == StartFailures(2, "KeyError")
    assert read_start_failures("app", "engine-n") == StartFailures()
    note_start("app", "engine-m")
    assert read_start_failures("app", "engine-m") == StartFailures(2)
    note_failed_start("app", "engine-m", RuntimeError("no such file\n  or folder"))
    assert read_start_failures("app", "engine-m") == StartFailures(3, "no such file or folder")
    store.gone = True
    note_failed_start("app", "engine-m", RuntimeError("the start's own error is what is raised"))
    assert read_start_failures("app", "engine-m").number == 3
