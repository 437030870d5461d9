from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Reservation
from engine.memory import ReservationPolicy


@pytest.mark.parametrize(
    ("name", "max_tokens", "reserved"),
    [
        ("orca_max", 25, 2048),
        ("orca_pow2", 25, 10 + 32),  # the paper's example: 32 for an output of 25
        ("orca_pow2", 32, 10 + 32),
        ("orca_pow2", 1, 10 + 1),
        ("orca_pow2", 2000, 2048),  # not beyond the longest sequence
        ("orca_oracle", 25, 35),
        ("orca_oracle", None, 2048),
        ("orca_pow2", None, 2048),
    ],
)
def test_the_papers_policies(name: Reservation, max_tokens: int | None, reserved: int) -> None:
    assert ReservationPolicy(name, 2048).num_tokens(10, max_tokens) == reserved


@given(num_prompt=st.integers(1, 500), max_tokens=st.integers(1, 500), beyond=st.integers(0, 2000))
def test_each_policy_reserves_enough_and_the_better_informed_no_more(
    num_prompt: int, max_tokens: int, beyond: int
) -> None:
    longest = num_prompt + max_tokens + beyond
    maximum, pow2, oracle = (
        ReservationPolicy(name, longest).num_tokens(num_prompt, max_tokens)
        for name in ("orca_max", "orca_pow2", "orca_oracle")
    )
    assert num_prompt + max_tokens == oracle <= pow2 <= maximum == longest
    assert pow2 - num_prompt < 2 * max_tokens, "the output is reserved at most twice over"
