"""What a dashboard is made of, as plain data."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["timeseries", "stat", "heatmap"]


class Query(NamedTuple):
    """A query in PromQL and how its series are called."""

    expr: str
    legend: str = ""


class Panel(NamedTuple):
    """One panel.

    Attributes:
        unit: Grafana's id of it.
        width: of 24 columns.
        alert: of infra/monitoring/alerts.yaml, what fires beyond `red`; counts are red from one on.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str = ""
    kind: Kind = "timeseries"
    width: int = 8
    stacked: bool = False
    maximum: float | None = None
    red: float | None = None
    alert: str = ""


class Row(NamedTuple):
    """Panels under a heading, side by side as far as they fit."""

    title: str
    panels: tuple[Panel, ...]


class Variable(NamedTuple):
    """What the reader chooses: labels of a series, or one of `values`."""

    name: str
    label: str
    query: str = ""
    values: tuple[str, ...] = ()
    chosen: str = ""


class Dashboard(NamedTuple):
    """One dashboard; its file is called as its `uid`."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
