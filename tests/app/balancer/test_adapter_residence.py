from __future__ import annotations

from app.balancer.adapter_residence import AdapterResidence


def test_what_replicas_tell() -> None:
    adapters = AdapterResidence()
    adapters.tell(0, ("a", "b"))
    adapters.tell(2, ("b",))
    assert [adapters.holders(name) for name in "abc"] == [0b1, 0b101, 0]
    adapters.tell(0, ("c",))
    assert [adapters.holders(name) for name in "abc"] == [0, 0b100, 0b1]
    adapters.drop(2)
    adapters.drop(1)
    assert [adapters.holders(name) for name in "abc"] == [0, 0, 0b1]


def test_a_booking_counts_until_it_is_computed() -> None:
    adapters = AdapterResidence()
    adapters.expect(1, "a")
    adapters.expect(1, "a")
    adapters.expect(1, "")
    adapters.tell(0, ("a",))
    assert adapters.holders("a") == 0b11
    assert adapters.holders("") == 0
    adapters.stop_expecting(1, "a")
    adapters.stop_expecting(1, "")
    assert adapters.holders("a") == 0b11
    adapters.stop_expecting(1, "a")
    assert adapters.holders("a") == 0b1
    adapters.expect(1, "a")
    adapters.drop(1)
    assert adapters.holders("a") == 0b1
