"""The usage ledger: who used which model how much, kept on disk; no Ray and no HTTP."""

from app.usage.ledger import UsageLedger
from app.usage.settings import UsageSettings

__all__ = ["UsageLedger", "UsageSettings"]
