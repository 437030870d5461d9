"""What all settings of a Serve config have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import ConfigError

# Ray's agent forgets a gauge that it has not heard of for twice its report interval, which is 10 s unless set.
AGENT_METRICS_S = Field(default=10.0, ge=0.1, le=20)


class Args(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def from_dict(cls, args: Any, root: str = "args") -> Self:
        """Validate part of a config; ConfigError says in one line what is wrong and where."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(describe(error, root, cls)) from None


def describe(error: ValidationError, root: str, settings: type[BaseModel] | None = None) -> str:
    """The first of pydantic's complaints in one line: `args.models[0].id: ...`.

    A key that nobody knows comes first: it is likely a misspelling, and the cause of whatever else is wrong.

    Args:
        settings: what was validated; the known keys are told then.
    """
    found = error.errors(include_url=False, include_input=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    location = first["loc"]
    where = root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = unknown_key(str(location[-1]), _keys_at(settings, location[:-1]))
    return f"{where}: {message}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is none of the known ones."""
    known = sorted(known)
    meant = difflib.get_close_matches(key, known, n=1)
    return "; ".join(
        ["unknown key", *(f"is it {name}?" for name in meant), *([f"known: {', '.join(known)}"] if known else [])]
    )


def _keys_at(settings: Any, location: Sequence[int | str]) -> Iterable[str]:
    """Keys of the settings at a location within others; none if there is no telling."""
    for part in location:
        settings = _without_none(settings)
        if isinstance(settings, type) and issubclass(settings, BaseModel):
            field = settings.model_fields.get(str(part))
            settings = None if field is None else field.annotation
        else:
            # Of a list's or a mapping's type the last argument is that of its values.
            settings = next(reversed(get_args(settings)), None)
    settings = _without_none(settings)
    return settings.model_fields if isinstance(settings, type) and issubclass(settings, BaseModel) else ()


def _without_none(kind: Any) -> Any:
    parts = [part for part in get_args(kind) if part is not type(None)]
    return parts[0] if len(parts) == 1 and type(None) in get_args(kind) else kind
