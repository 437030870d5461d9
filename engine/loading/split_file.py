"""A model's file that Python packages carry in parts, as package indexes bound the size of one: found and joined.

The parts of `model.gguf` are `model.gguf.part00`, `model.gguf.part01` and so on. They lie in the package that is named
or in those that it requires; a SHA256SUMS file in the former may say what they are together.
"""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.errors import ModelLoadError
from engine.loading.fingerprint import Span, content_fingerprint
from engine.loading.node_cache import CachedFile, cache_folder, make_once, reserve

_CHUNK_BYTES = 1 << 20
_PART = re.compile(r"(?P<name>.+\.gguf)\.part(?P<number>\d+)")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


class SplitFile(NamedTuple):
    """One file in parts.

    Attributes:
        source: what the user named it by, for errors.
        name: of the whole file.
        parts: in order.
        sha256: hex digest of the whole, or None where nothing says it.
        absent: required packages that are not installed, and so may lack parts.
    """

    source: str
    name: str
    parts: list[Path]
    sha256: str | None
    absent: list[str]

    def join(self) -> CachedFile:
        """The whole file, in use, in the node's cache: made by the first who asks, by content, so that copies are one.

        Raises:
            ModelLoadError: it is not what SHA256SUMS says, or the cache cannot be written.
        """
        spans = [(part, [Span(part.name, 0, part.stat().st_size)]) for part in self.parts]
        folder = cache_folder() / "joined" / content_fingerprint([(self.sha256 or "").encode()], spans)
        try:
            return make_once(folder / self.name, self._write)
        except OSError as error:
            raise ModelLoadError(
                f"{self.source}: cannot join its {len(self.parts)} parts in {folder}: {error}; XDG_CACHE_HOME names "
                f"another place"
            ) from error

    def _write(self, whole: BinaryIO) -> None:
        reserve(whole.fileno(), [range(sum(part.stat().st_size for part in self.parts))])
        digest = hashlib.sha256()
        for part in self.parts:
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    whole.write(chunk)
        if self.sha256 not in (None, digest.hexdigest()):
            raise ModelLoadError(
                f"{self.source}: its {len(self.parts)} parts make a {self.name} with SHA-256 {digest.hexdigest()}, "
                f"SHA256SUMS says {self.sha256}{_hint(self.absent)}"
            )


def find_split_file(source: str, package: str, folder: Path) -> SplitFile | None:
    """The file that an installed package and those it requires carry in parts, or None if there are no parts.

    Args:
        folder: where the package lies.

    Raises:
        ModelLoadError: parts are missing, or of more than one file.
    """
    candidates, absent = list(folder.glob("**/*.part*")), []
    for requirement in _requirements(package):
        try:
            files = metadata.distribution(requirement).files or []
        except metadata.PackageNotFoundError:
            absent.append(requirement)
            continue
        candidates += [Path(str(file.locate())) for file in files if ".part" in file.name]
    found: dict[str, dict[int, Path]] = {}
    for path in candidates:
        match = _PART.fullmatch(path.name)
        if match is not None and path.is_file():
            found.setdefault(match["name"], {})[int(match["number"])] = path
    if len(found) > 1:
        raise ModelLoadError(f"{source}: parts of more than one file are there: {', '.join(sorted(found))}")
    if not found:
        if absent:
            raise ModelLoadError(f"{source}: no model is in the package itself{_hint(absent)}")
        return None
    ((name, parts),) = found.items()
    # Some count from 1.
    missing = sorted(set(range(0 if 0 in parts else 1, max(parts))) - parts.keys())
    if missing:
        numbers = ", ".join(map(str, missing))
        raise ModelLoadError(f"{source}: {name} lacks part {numbers} before part {max(parts)}{_hint(absent)}")
    return SplitFile(source, name, [parts[i] for i in sorted(parts)], _sha256(folder, name), absent)


def _requirements(package: str) -> list[str]:
    """What the package's distribution requires always: not for an extra, nor on some systems only."""
    try:
        lines = metadata.distribution(package).requires or []
    except metadata.PackageNotFoundError:  # a folder on the path that pip knows nothing of
        return []
    matches = [_REQUIREMENT.match(line) for line in lines if ";" not in line]
    return [match[1] for match in matches if match is not None]


def _hint(absent: list[str]) -> str:
    names = " ".join(absent)
    return f"; packages that it requires are not installed; run: pip install {names}" if absent else ""


def _sha256(folder: Path, name: str) -> str | None:
    for sums in sorted(folder.glob("**/SHA256SUMS")):
        for line in sums.read_text(encoding="utf-8").splitlines():
            digest, _, listed = line.partition(" ")
            if listed.strip().removeprefix("*") == name:
                return digest.lower()
    return None
