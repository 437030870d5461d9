"""The pacer: nothing is held while the loop has time, at most 50 ms when it has none, and it finds back."""

from __future__ import annotations

from app.ingress.pacing import INTERVAL_S, MAX_HOLD_S, Pacer


class Clocks:
    """A loop of a given load."""

    def __init__(self) -> None:
        self.now_s = self.cpu_s = 0.0
        self.pacer = Pacer(lambda: self.now_s, lambda: self.cpu_s)

    def run(self, seconds: float, load: float) -> list[float]:
        """The holds that a stream was given while the loop had that load."""
        holds = []
        for _ in range(round(seconds / INTERVAL_S)):
            self.now_s += INTERVAL_S
            self.cpu_s += INTERVAL_S * load
            holds.append(self.pacer.hold_s())
        return holds


def test_an_idle_loop_holds_nothing() -> None:
    assert set(Clocks().run(5.0, 0.4)) == {0.0}


def test_a_busy_loop_holds_more_and_more_up_to_the_promise() -> None:
    holds = Clocks().run(5.0, 0.95)
    assert 0 < holds[0] < holds[1] < holds[-1] == MAX_HOLD_S
    assert holds == sorted(holds)


def test_between_the_bounds_the_hold_stays() -> None:
    clocks = Clocks()
    held = clocks.run(0.3, 0.95)[-1]
    assert set(clocks.run(2.0, 0.6)) == {held}


def test_an_end_of_the_load_ends_the_hold() -> None:
    clocks = Clocks()
    clocks.run(5.0, 0.95)
    holds = clocks.run(2.0, 0.1)
    assert holds == sorted(holds, reverse=True)
    assert holds[-1] == 0.0


def test_questions_in_quick_succession_measure_nothing() -> None:
    clocks = Clocks()
    for _ in range(100):
        clocks.now_s += INTERVAL_S / 1000
        clocks.cpu_s += INTERVAL_S / 1000
        assert clocks.pacer.hold_s() == 0.0
