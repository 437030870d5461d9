"""How `pytest -n N` shares tests out: whole files, so that a module's fixtures are built once, the longest files first.

Files that run Ray are marked `ray` and go to one process, in turn: of two clusters at a time, on a machine of two
cores, each would wait for the other.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler.loadscope import LoadScopeScheduling

_ROOT = Path(__file__).parents[1]


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """A file's tests are one unit of work, and so are those of all files that run Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid.partition("::")[0])


@cache
def unit_of(file: str) -> str:
    """The unit of work that a test file belongs to. The process that shares tests out has not loaded them, and knows
    no marks: it reads the file.

    Args:
        file: from the project's root.
    """
    return "ray" if "pytest.mark.ray" in (_ROOT / file).read_text() else file
