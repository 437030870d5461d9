"""`hf:org/name`: a model of the Hugging Face hub, in that library's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import ModelLoadError

_SOURCE = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
# What a checkpoint reads; files of other formats, and copies in subfolders, are left where they are.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_COPIES = ["*/*", "consolidated*.safetensors"]


def fetch_from_hub(source: str) -> Path:
    """The folder of a repository, or a .gguf file of one, on this node.

    The library takes part in its standard environment: HF_TOKEN, HF_ENDPOINT, HF_HOME, and with HF_HUB_OFFLINE=1 only
    what is there already. It locks its cache, so that the processes of a node download once, and goes on where a killed
    one has stopped.

    Args:
        source: "hf:ORG/NAME", perhaps with "/FILE.gguf", perhaps with "@REVISION" (a branch, tag or commit).

    Raises:
        ModelLoadError: it cannot be had; the message says why.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ModelLoadError(f"{source}: expected hf:org/name, hf:org/name/file.gguf, either with @revision")
    # Here, as most starts need none of it.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, name, revision = match["repository"], match["file"], match["revision"]
    try:
        if name is not None:
            return Path(hf_hub_download(repository, name, revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES, ignore_patterns=_COPIES))
    except GatedRepoError as error:
        raise ModelLoadError(f"{source}: its owners must grant access first; then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"{source}: no such repository, or it is private and HF_TOKEN does not open it") from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{source}: no such revision: {revision}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelLoadError(
            f"{source}: it is not in the hub's cache on this node, and the hub cannot be asked "
            f"(HF_HUB_OFFLINE, or no connection): fetch it once with a connection, or give a folder"
        ) from error
    except EntryNotFoundError as error:
        raise ModelLoadError(f"{source}: no such file in the repository") from error
    except HfHubHTTPError as error:
        raise ModelLoadError(f"{source}: the hub refuses: {error}") from error
    except OSError as error:
        raise ModelLoadError(f"{source}: {error}") from error
