from __future__ import annotations

import pickle
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.parallel import ALONE, TensorParallelGroup

PAIR: dict[str, Any] = {"rank": 1, "world_size": 2, "address": "127.0.0.1:4000", "segment": "quire-test"}


def test_a_rank_alone_needs_no_meeting_place() -> None:
    assert not ALONE.is_parallel
    assert ALONE.on_one_node


def test_a_group_travels_to_its_worker() -> None:
    group = TensorParallelGroup(**PAIR, num_local_ranks=2)
    assert pickle.loads(pickle.dumps(group)) == group
    assert (group.host, group.port) == ("127.0.0.1", 4000)
    assert group.on_one_node
    assert not TensorParallelGroup(**PAIR).on_one_node
    assert TensorParallelGroup(**PAIR | {"address": "[::1]:80"}).host == "[::1]"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("world_size", 0),
        ("rank", 2),
        ("num_local_ranks", 3),
        ("address", "nowhere"),
        ("address", "host:0"),
        ("address", "host:70000"),
        ("segment", ""),
        ("segment", "a/b"),
        ("timeout_s", 0),
        ("join_timeout_s", "soon"),
    ],
)
def test_a_bad_field_is_refused_and_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        TensorParallelGroup(**PAIR | {field: value})
