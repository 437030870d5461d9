"""Is it a dashboard? By Grafana's own types of one (grafana-foundation-sdk), field for field and value for value."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

register_default_plugins()
_UNITS = {getattr(units, name) for name in dir(units) if isinstance(getattr(units, name), str)}


def schema_problems(dashboard: dict[str, Any]) -> list[str]:
    """Fields that Grafana does not have, and values of another type than it has."""
    try:
        read = Dashboard.from_json(dashboard)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"cannot be read: {error!r}"]
    written = json.loads(json.dumps(read, cls=JSONEncoder))
    return [*_dropped(dashboard, written, "dashboard"), *_mistyped(read, "dashboard")]


def layout_problems(dashboard: dict[str, Any]) -> Iterator[str]:
    """What no type says: ids and places are a panel's own, variables exist, units are known."""
    panels = dashboard["panels"]
    taken: dict[tuple[int, int], str] = {}
    ids = [panel["id"] for panel in panels]
    if len(set(ids)) != len(ids):
        yield "two panels have one id"
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for name in _variables_in(json.dumps(dashboard)):
        if name not in variables and not name.startswith("__"):
            yield f"no variable {name}"
    for panel in panels:
        at = panel["gridPos"]
        if at["x"] + at["w"] > 24:
            yield f"{panel['title']} is wider than the page"
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            if cell in taken:
                yield f"{panel['title']} lies over {taken[cell]}"
                break
            taken[cell] = panel["title"]
        if panel["type"] == "row":
            continue
        if panel["fieldConfig"]["defaults"]["unit"] not in _UNITS:
            yield f"{panel['title']}: {panel['fieldConfig']['defaults']['unit']} is no unit"
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            if source != {"type": "prometheus", "uid": "${datasource}"}:
                yield f"{panel['title']} does not ask the datasource that is chosen"


def _variables_in(text: str) -> set[str]:
    return {one or other for one, other in re.findall(r"\$(?:\{(\w+)\}|(\w+))", text)}


def _dropped(given: Any, kept: Any, where: str) -> Iterator[str]:
    """What did not come through the types."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from _dropped(value, kept[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is no such field"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _dropped(one, other, f"{where}[{index}]")
    elif given != kept:
        yield f"{where}: {given!r} was read as {kept!r}"


def _mistyped(value: Any, where: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(type(value)).items():
        if hasattr(value, name):
            yield from _compared(getattr(value, name), hint, f"{where}.{name.removesuffix('_val')}")


def _compared(value: Any, hint: Any, where: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (object, Any):
        if hasattr(value, "to_json"):
            yield from _mistyped(value, where)
    elif origin in (typing.Union, types.UnionType):
        found = [list(_compared(value, each, where)) for each in arguments]
        if all(found):
            yield min(found, key=len)[0]
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{where}: {value!r} is none of {arguments}"
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
        else:
            for index, each in enumerate(value):
                yield from _compared(each, arguments[0], f"{where}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no object"
    elif isinstance(hint, type) and issubclass(hint, Enum):
        if value not in [each.value for each in hint]:
            yield f"{where}: {value!r} is none of {[each.value for each in hint]}"
    elif isinstance(hint, type):
        number = hint in (int, float) and isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, hint) and not number:
            yield f"{where}: {value!r} is no {hint.__name__}"
        elif hasattr(value, "to_json"):
            yield from _mistyped(value, where)
