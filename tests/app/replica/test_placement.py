"""A bundle for each rank, with what a rank takes."""

from __future__ import annotations

from typing import Any

import pytest

from app.config import ModelArgs
from app.replica.placement import describe_bundles, placement_options, rank_bundles


def model(size: int, **deployment: Any) -> ModelArgs:
    fields = {"id": "m", "source": "x", "engine": {"tensor_parallel_size": size}, "deployment": deployment}
    return ModelArgs.model_validate(fields)


def test_one_rank_needs_no_placement_group() -> None:
    assert placement_options(model(1)) == {}


@pytest.mark.parametrize(("given", "expected"), [({}, "STRICT_PACK"), ({"placement_group_strategy": "PACK"}, "PACK")])
def test_ranks_share_a_node_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    options = placement_options(model(2, **given))
    assert options == {"placement_group_bundles": [{"CPU": 0.5}] * 2, "placement_group_strategy": expected}


def test_a_bundle_is_what_a_rank_takes() -> None:
    wanted = {"num_cpus": 0, "num_gpus": 1, "memory": 5, "resources": {"disk": 2}, "accelerator_type": "H200"}
    bundles = rank_bundles(model(3, ray_actor_options=wanted))
    assert bundles == [{"GPU": 1.0, "memory": 5.0, "disk": 2.0, "accelerator_type:H200": 0.001}] * 3


def test_people_read_how_many_of_what_and_where() -> None:
    assert describe_bundles([{"CPU": 0.5, "GPU": 1.0}] * 4, "STRICT_PACK") == "4 x {CPU: 0.5, GPU: 1} on one node"
    assert describe_bundles([{"GPU": 1.0}] * 4, "PACK") == "4 x {GPU: 1}"
