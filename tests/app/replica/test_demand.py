from __future__ import annotations

from app.replica.demand import Demand, DemandTotals
from app.transport.demand_messages import DemandShare


def test_what_has_come_adds_up_and_what_waits_is_the_latest_of_each_ingress() -> None:
    demand = Demand()
    demand.told("a", DemandShare(0.5, 2.0, 100.0, 5e3, 30.0, 4.0))
    demand.told("b", DemandShare(0.5, 1.0, 50.0, 2500.0, 10.0, 1.0))
    demand.told("a", DemandShare(0.25, 1.0, 10.0, 100.0, 5.0, 0.5))
    assert demand.totals == DemandTotals(4.0, 160.0, 7600.0, 45.0, 1.5, 0.75, 2)


def test_what_waited_in_an_ingress_goes_with_it_and_what_it_was_asked_for_stays() -> None:
    demand = Demand()
    demand.told("a", DemandShare(0.5, 2.0, 100.0, 5e3, 30.0, 4.0))
    demand.gone("a")
    demand.gone("never told anything")
    assert demand.totals == DemandTotals(2.0, 100.0, 5e3, 30.0, 0.0, 0.0, 0)
