"""Every Serve config, those inside a RayService too, is one that Serve and Quire take; and a mistake is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.kustomize import render
from tests.infra.serve_config import serve_problems

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "serve_configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "infra" / "kubernetes" / "overlays").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file(path: Path) -> None:
    assert serve_problems(path.read_text()) == []


@pytest.mark.parametrize("overlay", [ROOT / "infra/kubernetes/base", *OVERLAYS], ids=lambda path: path.name)
def test_what_a_ray_service_embeds(overlay: Path) -> None:
    (service,) = (manifest for manifest in render(overlay) if manifest["kind"] == "RayService")
    assert serve_problems(service["spec"]["serveConfigV2"]) == []


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("port: 8000", "port: eighty", "valid integer"),
        ("proxy_location: EveryNode", "proxy_location: Everywhere", "proxy_location"),
        ("app.builder:build_model", "app.builder:build_modle", "is not Quire's"),
        ("num_replicas: 2", "replicas: 2", "unknown key"),
        ("max_num_seqs: 64", "max_num_sequences: 64", "max_num_sequences"),
        ("proxy: haproxy", "proxy: nginx", "proxy"),
        ("application: smollm2", "application: smollm", "no application 'smollm' with a model"),
        ("name: Ingress", "name: Ingres", "no deployment Ingres"),
    ],
)
def test_a_mistake_is_caught(right: str, wrong: str, problem: str) -> None:
    (service,) = (each for each in render(ROOT / "infra/kubernetes/base") if each["kind"] == "RayService")
    text = service["spec"]["serveConfigV2"]
    assert right in text
    found = serve_problems(text.replace(right, wrong))
    assert found
    assert problem in found[0]
