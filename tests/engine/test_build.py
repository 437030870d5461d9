"""What an engine of several ranks is refused before anything is started for it."""

from __future__ import annotations

import pytest
import torch

from engine import build
from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10, "tensor_parallel_size=10 is more than the model's num_heads=9"),
        (3, "more than the GPUs of this machine, 2"),
    ],
)
def test_more_ranks_than_there_are_parts_or_gpus(size: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        build_engine("dummy:smollm2-135m", EngineConfig(tensor_parallel_size=size))


def test_a_machine_without_the_gpus_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="more than the GPUs of this machine, 0"):
        build_engine("dummy:smollm2-135m", EngineConfig(tensor_parallel_size=2, device="cuda"))
