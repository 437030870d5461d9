"""How `pytest -n N` shares tests out: whole files, so that a module's fixtures are built once, the longest files first.

Modules that run Ray are marked `xdist_group("ray")` and go to one process, in turn: of two clusters at a time, on a
machine of two cores, each would wait for the other.
"""

from __future__ import annotations

from xdist.scheduler.loadscope import LoadScopeScheduling


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """A file's tests are one unit of work, and so are those of all files of a group."""

    def _split_scope(self, nodeid: str) -> str:
        """The unit of a test. Workers add `@GROUP` to a grouped test's id (`--dist loadgroup`)."""
        file, _, test = nodeid.partition("::")
        return test.rpartition("@")[2] if test.rfind("@") > test.rfind("]") else file
