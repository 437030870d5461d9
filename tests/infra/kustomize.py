"""What `kubectl kustomize` makes of a folder, as far as infra/kubernetes uses it; anything else is an error.

Resources of other folders, ConfigMaps from files, a namespace, image tags, and JSON patches (RFC 6902). A strategic
merge would not do: Kustomize knows no merge keys of a RayService and would replace its lists whole.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

_KEYS = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "configMapGenerator"}
_CLUSTER_WIDE = {"Namespace"}

Manifest = dict[str, Any]


class KustomizeError(Exception):
    """A kustomization that Kustomize would refuse, or that does nothing."""


def render(folder: Path) -> list[Manifest]:
    """The manifests that a folder with a kustomization.yaml stands for."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := kustomization.keys() - _KEYS:
        raise KustomizeError(f"{folder.name}: unknown keys {sorted(unknown)}")
    manifests: list[Manifest] = []
    for entry in kustomization["resources"]:
        path = folder / entry
        if path.is_dir():
            manifests += render(path)
        elif path.is_file():
            manifests += [manifest for manifest in yaml.safe_load_all(path.read_text()) if manifest]
        else:
            raise KustomizeError(f"{folder.name}: no resource {entry}")
    manifests += [_config_map(folder, entry) for entry in kustomization.get("configMapGenerator", [])]
    for image in kustomization.get("images", []):
        if not sum(_set_image(manifest, image) for manifest in manifests):
            raise KustomizeError(f"{folder.name}: no container has the image {image['name']}")
    for patch in kustomization.get("patches", []):
        _patch(folder, manifests, patch)
    if namespace := kustomization.get("namespace"):
        for manifest in manifests:
            if manifest["kind"] not in _CLUSTER_WIDE:
                manifest["metadata"]["namespace"] = namespace
    return manifests


def _config_map(folder: Path, entry: Manifest) -> Manifest:
    """Of files that lie in the folder: Kustomize reads no others."""
    options = entry.get("options", {})
    if entry.keys() != {"name", "files", "options"} or options.get("disableNameSuffixHash") is not True:
        raise KustomizeError(f"{folder.name}: {entry['name']} is not of files, named as it stands")
    data = {}
    for file in entry["files"]:
        path = (folder / file).resolve()
        if not path.is_file() or not path.is_relative_to(folder.resolve()):
            raise KustomizeError(f"{folder.name}: no file {file} in it")
        data[path.name] = path.read_text()
    metadata = {"name": entry["name"]} | {key: options[key] for key in ("labels", "annotations") if key in options}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _set_image(node: Any, image: dict[str, str]) -> int:
    """As Kustomize: wherever a list is called containers or initContainers."""
    changed = 0
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    if container["image"].partition(":")[0] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
                        changed += 1
            changed += _set_image(value, image)
    elif isinstance(node, list):
        changed += sum(_set_image(value, image) for value in node)
    return changed


def _patch(folder: Path, manifests: list[Manifest], patch: Manifest) -> None:
    target = patch["target"]
    group = f"{target['group']}/{target['version']}" if "group" in target else target["version"]
    found = [
        each
        for each in manifests
        if (each["apiVersion"], each["kind"], each["metadata"]["name"]) == (group, target["kind"], target["name"])
    ]
    if not found:
        raise KustomizeError(f"{folder.name}: {patch['path']} patches {target['kind']} {target['name']}, which is not")
    for operation in yaml.safe_load((folder / patch["path"]).read_text()):
        for manifest in found:
            _apply(manifest, operation, f"{folder.name}/{patch['path']}")


def _apply(document: Manifest, operation: Manifest, where: str) -> None:
    *parents, last = operation["path"].strip("/").replace("~1", "/").split("/")
    node: Any = document
    try:
        for step in parents:
            node = node[int(step)] if isinstance(node, list) else node[step]
        key: Any = int(last) if isinstance(node, list) else last
        if operation["op"] == "replace":
            _ = node[key]  # it must be there
            node[key] = copy.deepcopy(operation["value"])
        elif operation["op"] == "add" and isinstance(node, dict):
            node[key] = copy.deepcopy(operation["value"])
        else:
            raise KustomizeError(f"{where}: {operation['op']} is not supported here")
    except (KeyError, IndexError, ValueError, TypeError):
        raise KustomizeError(f"{where}: nothing is at {operation['path']}") from None
