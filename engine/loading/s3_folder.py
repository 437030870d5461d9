"""`s3://bucket/prefix`: a folder on this node whose files fill from S3 as they are read.

The cache of the node holds each object once, by its ETag; a model is a folder of links to them. Objects are fetched in
parallel ranges: small files at once, weights as they are asked for, so that an ingress gets by with headers and
samples, and a rank with its slices.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from engine.errors import ModelLoadError
from engine.loading.file_supply import FileSupply
from engine.loading.node_cache import cache_folder, locked, reserve
from engine.loading.s3_checksum import Checksum, checksum_of
from engine.loading.s3_client import CONNECTIONS, Bucket, S3Object
from engine.loading.s3_errors import explain
from engine.loading.s3_object import BLOCK_BYTES, CachedObject
from engine.progress import Progress

# One request's bytes: long enough that its latency is small beside it, short enough that all connections have work.
PART_BYTES = 8 << 20

_SMALL_FILES = (".json", ".txt", ".model", ".jinja")


class S3Folder(FileSupply):
    """A model's objects as a folder of links into the node's cache.

    Args:
        source: "s3://bucket/prefix", or a single object "s3://bucket/path/model.gguf".
        progress: told of bytes as they come; without it a bar is drawn, on a terminal.

    Attributes:
        folder: on this node. Its files are read only after `fetch`.

    Raises:
        ModelLoadError: nothing is there, or it may not be read.
    """

    def __init__(self, source: str, progress: Progress | None = None) -> None:
        super().__init__()
        self.source = source
        self._progress = progress
        bucket_name, _, prefix = source.removeprefix("s3://").partition("/")
        if not source.startswith("s3://") or not bucket_name:
            raise ModelLoadError(f"{source}: expected s3://bucket/prefix")
        self._bucket = Bucket(bucket_name)
        place = f"{self._bucket.endpoint} {bucket_name}"
        root = cache_folder() / "s3"
        try:
            self._objects = {
                name: CachedObject(root / "objects", place, item) for name, item in self._list(prefix.rstrip("/"))
            }
            self.folder = self._link(root / "snapshots", prefix.rstrip("/") or bucket_name)
        except OSError as error:
            raise explain(error, source, self._bucket.endpoint) from error
        self.fetch({self.folder / name: None for name in self._objects if name.endswith(_SMALL_FILES)})

    def name_of(self, path: Path) -> str:
        """The object's address."""
        return self._bucket.url(self._objects[path.name].item.key)

    def fetch(self, wanted: Mapping[Path, Sequence[range] | None]) -> None:
        """See FileSupply.fetch. Each byte comes once to a node: who comes while another fetches, waits for it."""
        asked = {self._objects[path.name]: ranges for path, ranges in wanted.items() if path.name in self._objects}
        # Whoever has what is needed waits for nobody.
        lacking = {item: ranges for item, ranges in asked.items() if item.missing(ranges) or _is_unverified(item)}
        if not lacking:
            return
        with ExitStack() as locks:
            for item in sorted(lacking, key=lambda item: item.path.name):  # one order, so that none waits in a ring
                locks.enter_context(locked(item.lock_path))
            self._fetch_locked(lacking)

    def _fetch_locked(self, wanted: Mapping[CachedObject, Sequence[range] | None]) -> None:
        missing = {item: item.missing(ranges) for item, ranges in wanted.items()}
        for item, ranges in missing.items():
            if ranges:
                try:
                    reserve(item.file.fd, ranges)
                    item.begin()
                except OSError as error:
                    raise self._explain(item, error) from error
        parts = [
            (item, range(start, min(start + PART_BYTES, whole.stop)))
            for item, ranges in missing.items()
            for whole in ranges
            for start in range(whole.start, whole.stop, PART_BYTES)
        ]
        with self._counter(sum(len(part) for _, part in parts)) as count:
            _in_parallel([partial(self._fetch_part, item, part, count) for item, part in parts])
        try:
            for item, ranges in missing.items():
                if ranges:
                    item.settle()
        except OSError as error:
            raise self._explain(item, error) from error
        _in_parallel([partial(self._verify, item) for item in wanted if _is_unverified(item)])

    def _fetch_part(self, item: CachedObject, part: range, count: _Count) -> None:
        marked = part.start

        def take(offset: int, data: bytes) -> None:
            nonlocal marked
            try:
                item.write(offset, data)
            except OSError as error:
                raise self._explain(item, error) from error
            end = offset + len(data)
            item.mark(range(marked, end))
            marked = end // BLOCK_BYTES * BLOCK_BYTES
            count(len(data))

        self._bucket.read(item.item, part, take)

    def _verify(self, item: CachedObject) -> None:
        """Compare a whole object with what S3 knows of it; of parts of one, only lengths and ETag are compared."""
        checksum = checksum_of(self._bucket.head(item.item))
        if checksum is not None and not self._matches(item, checksum):
            item.forget()
            raise ModelLoadError(
                f"{self._bucket.url(item.item.key)}: what came does not have the object's {checksum.algorithm}; "
                f"it was thrown away: start again, and if it stays so, upload the object again"
            )
        item.set_verified()

    def _matches(self, item: CachedObject, checksum: Checksum) -> bool:
        if checksum.of_whole and checksum.matches(item.path):
            return True
        if not checksum.num_parts:
            return False
        size = item.item.size
        # All parts but the last are nearly always equal: one request instead of as many as there are parts.
        first = self._part_bytes(item.item, 1)
        equal = [min(first, size - start) for start in range(0, size, first)] if first else []
        if len(equal) == checksum.num_parts and checksum.matches(item.path, equal):
            return True
        parts = [self._part_bytes(item.item, number) for number in range(1, checksum.num_parts + 1)]
        return sum(parts) == size and checksum.matches(item.path, parts)

    def _part_bytes(self, item: S3Object, number: int) -> int:
        return int(self._bucket.head(item, number)["ContentLength"])

    def _list(self, prefix: str) -> Iterator[tuple[str, S3Object]]:
        """The model's files by name: the objects right below the prefix, or the one that it names."""
        if prefix.endswith(".gguf"):
            found = [item for item in self._bucket.list(prefix, "/") if item.key == prefix]
        else:
            found = self._bucket.list(f"{prefix}/" if prefix else "", "/")
        files = [(item.key.rpartition("/")[2], item) for item in found]
        files = [(name, item) for name, item in files if name not in ("", ".", "..")]
        if not files:
            raise ModelLoadError(
                f"{self.source}: no object is there at {self._bucket.endpoint}; the prefix must be that of "
                f"config.json, or the key of a .gguf file"
            )
        yield from files

    def _link(self, snapshots: Path, prefix: str) -> Path:
        versions = "\0".join(f"{name} {item.path.name}" for name, item in sorted(self._objects.items()))
        digest = hashlib.sha256(versions.encode()).hexdigest()[:16]
        folder = snapshots / digest / prefix.rpartition("/")[2].removesuffix(".gguf")
        folder.mkdir(parents=True, exist_ok=True)
        for name, item in self._objects.items():
            with contextlib.suppress(FileExistsError):
                (folder / name).symlink_to(item.path)
        return folder

    def _explain(self, item: CachedObject, error: OSError) -> ModelLoadError:
        return explain(error, self._bucket.url(item.item.key), self._bucket.endpoint)

    @contextmanager
    def _counter(self, total: int) -> Iterator[_Count]:
        with tqdm(
            total=total,
            desc=f"fetching {self.source}",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=True if self._progress is not None else None,  # None: unless it is a terminal
        ) as bar:
            yield _Count(bar, total, self._progress)


class _Count:
    """Bytes that came, of all threads."""

    def __init__(self, bar: tqdm[None], total: int, progress: Progress | None) -> None:
        self._bar = bar
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._bar.update(num_bytes)
            if self._progress is not None:
                self._progress("fetching weights", self._done, self._total)


def _is_unverified(item: CachedObject) -> bool:
    return item.is_whole and not item.is_verified


def _in_parallel(jobs: Sequence[Callable[[], None]]) -> None:
    """Run all; the first failure stops those that have not begun, and is raised."""
    if not jobs:
        return
    with ThreadPoolExecutor(min(CONNECTIONS, len(jobs)), thread_name_prefix="s3") as pool:
        futures: list[Future[None]] = [pool.submit(job) for job in jobs]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in done:
            future.result()
