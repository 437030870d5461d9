"""How long-running starts report what they do."""

from __future__ import annotations

from collections.abc import Callable

# Called with (what is under way, units done, units in all), e.g. ("loading weights", 12, 272).
Progress = Callable[[str, int, int], None]
