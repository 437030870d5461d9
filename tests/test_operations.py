"""docs/operations.md: its sizing formula is the engine's arithmetic, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.execution.cache_engine import CacheEngine
from engine.loading import open_checkpoint

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text()


@pytest.fixture(scope="module")
def formula() -> dict[str, Any]:
    """The worked example, run as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_blocks_and_weights_are_as_large_as_the_engine_makes_them(formula: dict[str, Any]) -> None:
    checkpoint = open_checkpoint("dummy:llama-3.1-8b")
    config = checkpoint.model_config()
    assert formula["block_bytes"] == CacheEngine.block_bytes(config, formula["block_size"], torch.bfloat16)
    assert formula["weight_bytes"] == checkpoint.num_weight_bytes


def test_the_text_has_the_formulas_results(formula: dict[str, Any]) -> None:
    said = re.sub(r"\s+", " ", TEXT)
    assert formula["block_bytes"] == 2 << 20
    assert (
        f"2 MiB a block, {formula['num_blocks']:,} blocks and room for {formula['seats']} requests in a replica" in said
    )
    found = formula["found"]
    running, token_ms = f"{found.running:.0f} requests run", f"{1e3 * found.tpot_s:.0f} ms a token"
    assert f"{formula['needed']} replicas would do, on each of which {running} at {token_ms}" in said
    assert f"keep the target up to {formula['bearable']:.1f} requests a second" in said
    assert f"{formula['replicas']} replicas, one of them to spare" in said
    assert found.ttft_p95_s < 2.0


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:infra|tests|serve_configs|docs)/[\w./-]+)`", TEXT))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_variables_that_are_named_are_read_somewhere() -> None:
    sources = "".join(path.read_text() for folder in ("app", "engine") for path in (ROOT / folder).rglob("*.py"))
    for name in set(re.findall(r"`(QUIRE_\w+|AWS_\w+)`", TEXT)):
        assert name in sources, f"nothing reads {name}"
