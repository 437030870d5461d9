"""Where a checkpoint's files come from: they lie on this node, or come to it as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.loading.node_cache import CachedFile

# Byte ranges of files; None is a whole file.
Wanted = Mapping[Path, Sequence[range] | None]


class FileSupply:
    """Files that are there already.

    Args:
        in_use: files of the node's cache that must stay as long as this object does.
    """

    def __init__(self, *in_use: CachedFile) -> None:
        self._in_use = in_use

    def fetch(self, wanted: Wanted) -> None:
        """Return once these bytes can be read from their files; until then a file may hold zeros in their place.

        Raises:
            ModelLoadError: they cannot be had; the message names the object and says what to do.
        """

    def name_of(self, path: Path) -> str:
        """What an error should call a file."""
        return str(path)


LOCAL = FileSupply()
