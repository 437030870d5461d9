from __future__ import annotations

from pathlib import Path

from app.config import AppArgs
from app.usage import UsageSettings
from tests.app.config.arguments import args


def test_usage_as_the_ledger_takes_it() -> None:
    usage = {"directory": "/var/usage", "roll_mb": 0.5, "fsync_s": 2, "keep_days": 90, "copy_to": "s3://b/p"}
    parsed = AppArgs.from_dict(args(ingress={"usage": usage})).ingress.usage
    assert parsed is not None
    assert parsed.settings == UsageSettings(
        Path("/var/usage"), roll_bytes=1 << 19, sync_s=2.0, keep_days=90.0, copy_to="s3://b/p"
    )
    assert AppArgs.from_dict(args()).ingress.usage is None
