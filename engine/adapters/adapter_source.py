"""Where an adapter comes from: a folder, or one that is fetched to this node from S3 or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from engine.errors import ModelLoadError
from engine.loading.file_supply import LOCAL, FileSupply

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterFolder(NamedTuple):
    """A PEFT folder on this node. Its files stay there as long as `supply` lives."""

    path: Path
    supply: FileSupply


def open_adapter(source: str) -> AdapterFolder:
    """The folder that `source` names, with its config and weights on this node.

    All of it is fetched now, so that a request which needs the adapter later cannot fail for want of a network.

    Args:
        source: a folder, "s3://BUCKET/PREFIX", or "hf:ORG/NAME", perhaps with "@REVISION".

    Raises:
        ModelLoadError: nothing is there, it has no adapter_config.json, or it cannot be had.
    """
    path, supply = _fetch(source)
    if not path.is_dir():
        raise ModelLoadError(f"{source}: no such folder")
    if not (path / CONFIG).is_file():
        raise ModelLoadError(f"{source}: {CONFIG} is missing; expected a folder that PEFT has saved")
    return AdapterFolder(path, supply)


def _fetch(source: str) -> tuple[Path, FileSupply]:
    if source.startswith("s3:"):
        from engine.loading.s3_folder import S3Folder  # here, as boto3 takes long to import

        s3 = S3Folder(source)
        s3.fetch({s3.folder / name: None for name in (CONFIG, WEIGHTS)})
        return s3.folder, s3
    if source.startswith("hf:"):
        from engine.loading.hub import fetch_from_hub

        return fetch_from_hub(source), LOCAL
    return Path(source).expanduser(), LOCAL
