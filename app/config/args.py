"""What all settings of a Serve config have in common."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import ConfigError

# Ray's agent forgets a gauge that it has not heard of for twice its report interval, which is 10 s unless set.
AGENT_METRICS_S = Field(default=10.0, ge=0.1, le=20)


class Args(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def from_dict(cls, args: Any, root: str = "args") -> Self:
        """Validate part of a config; ConfigError says in one line what is wrong and where."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(describe(error, root)) from None


def describe(error: ValidationError, root: str) -> str:
    """The first of pydantic's complaints in one line: `args.models[0].id: ...`."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{where}: {message}" + (f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else "")
