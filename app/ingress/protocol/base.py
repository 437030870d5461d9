"""What all request bodies share: unknown parameters are errors, and so are known ones that Quire does not implement."""

from __future__ import annotations

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A request body or a part of one. Strict: "5" is no number, and nothing unknown passes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def no_op_only(*allowed: Any) -> AfterValidator:
    """Mark a parameter that OpenAI has and Quire does not implement yet.

    Only null and the values `allowed`, with which the parameter changes nothing, are accepted; anything else is an
    error that names the parameter, because a parameter must never be ignored silently.
    """

    def check(value: Any, info: ValidationInfo) -> Any:
        # Types too: in Python True == 1, in JSON they differ.
        if value is None or any(type(value) is type(item) and value == item for item in allowed):
            return value
        hint = "leave it out" if not allowed else f"only {' or '.join(map(repr, allowed))} is"
        raise PydanticCustomError(
            "not_supported", "{name} is not supported yet; {hint}", {"name": info.field_name, "hint": hint}
        )

    return AfterValidator(check)


def invalid(message: str) -> PydanticCustomError:
    """An error of a hand-written validator; pydantic adds where it happened."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def is_token_id(value: Any) -> bool:
    """A JSON integer that can be a token id. Booleans are integers only to Python."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
