from __future__ import annotations

from app.config import deployment_names


def test_deployments_stay_apart_where_ids_look_alike() -> None:
    assert list(deployment_names(["a/b", "a:b", "a-b"]).values()) == ["engine-a-b", "engine-a-b-2", "engine-a-b-3"]
