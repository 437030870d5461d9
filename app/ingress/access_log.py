"""The access log: a line for each request for tokens when it has ended, if a config asks for it."""

from __future__ import annotations

import logging
from typing import Any

from app.telemetry.ingress_metrics import RequestRecord

logger = logging.getLogger(__name__)


def log_request(record: RequestRecord) -> None:
    """Write a request's line. In JSON its numbers are fields: tokens, and seconds in milliseconds' precision."""
    usage, first_token_s, duration_s = record.usage, record.first_token_s, record.duration_s
    fields: dict[str, Any] = {
        "endpoint": record.endpoint,
        "model": record.model_id,
        "status": int(record.code),
        "duration_s": round(duration_s, 3),
    }
    tokens = first = ""
    if usage is not None:
        fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }
        tokens = f", {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} more"
    if first_token_s is not None:
        fields["time_to_first_token_s"] = round(first_token_s, 3)
        first = f", the first after {first_token_s:.3f} s"
    text = "%s %s %d in %.3f s%s%s"
    logger.info(text, record.endpoint, record.model_id or "-", record.code, duration_s, tokens, first, extra=fields)
