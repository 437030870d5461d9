"""What can never be placed is an error that says what is missing; what may have to wait is none."""

from __future__ import annotations

import pytest

from app.replica.supply import NodeGroup, Supply, check_supply
from engine.errors import ConfigError

RANKS = [{"CPU": 1.0, "GPU": 1.0}] * 4
BIG, SMALL = {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("strategy", "supply"),
    [
        ("STRICT_PACK", Supply([NodeGroup(SMALL), NodeGroup(BIG)])),
        ("PACK", Supply([NodeGroup(SMALL), NodeGroup(SMALL)])),
        ("PACK", Supply([NodeGroup(SMALL, 2)])),
        ("PACK", Supply([NodeGroup(SMALL, None)])),
        ("STRICT_PACK", Supply([NodeGroup(SMALL), NodeGroup(BIG, None)])),
        ("STRICT_PACK", Supply([], is_open=True)),
    ],
)
def test_what_fits_or_may_come_is_no_error(strategy: str, supply: Supply) -> None:
    check_supply("m", RANKS, strategy, supply)


@pytest.mark.parametrize(
    ("strategy", "supply", "missing"),
    [
        ("STRICT_PACK", Supply([NodeGroup(SMALL)] * 9), r"GPU 4 where a node has 2 at most"),
        ("STRICT_PACK", Supply([NodeGroup(BIG, 0), NodeGroup(SMALL, None)]), "no node has all of it"),
        ("STRICT_PACK", Supply([NodeGroup({"CPU": 2.0})]), r"CPU 4 where .* 2 at most; GPU 4 where .* 0 at most"),
        ("STRICT_PACK", Supply([NodeGroup({"CPU": 8.0}), NodeGroup({"GPU": 8.0})]), "no node has all of it"),
        ("PACK", Supply([NodeGroup(SMALL)]), "all nodes together hold 2 of them"),
        ("PACK", Supply([]), "GPU 1 where a node has 0 at most"),
    ],
)  # fmt: skip
def test_what_no_node_can_have_is_named(strategy: str, supply: Supply, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"model 'm': tensor_parallel_size=4 needs 4 x .*({missing})"):
        check_supply("m", RANKS, strategy, supply)


def test_fractions_add_up_as_ray_adds_them() -> None:
    check_supply("m", [{"CPU": 0.1}] * 3, "STRICT_PACK", Supply([NodeGroup({"CPU": 0.3})]))
    with pytest.raises(ConfigError):
        check_supply("m", [{"CPU": 0.1}] * 4, "STRICT_PACK", Supply([NodeGroup({"CPU": 0.3})]))
