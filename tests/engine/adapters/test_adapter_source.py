"""Adapters from S3 (moto's) and the hub (a few routes on this machine): the same numbers as from a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import EngineConfig, LLMEngine
from engine.adapters.adapter_source import open_adapter
from engine.errors import ModelLoadError
from engine.loading import s3_client
from tests.engine.adapters.peft import read, write_adapter, write_base
from tests.engine.loading.s3_server import S3Server, running_s3, use_s3
from tests.engine.loading.test_hub import running_hub

ROOT = Path(__file__).parents[3]
READ = """
import sys
from engine.adapters import read_adapter
from engine.errors import QuireError
from engine.loading import open_checkpoint
try:
    adapter = read_adapter("a", sys.argv[1], open_checkpoint(sys.argv[2]).model_config(), 64)
    print(adapter.factors("layers.1.down").b.sum())
except QuireError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_adapter(tmp_path_factory.mktemp("adapter") / "sql", base, seed=3))


@pytest.fixture
def s3(adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    with running_s3() as server:
        for path in adapter.iterdir():
            server.client.upload_file(str(path), "models", f"adapters/sql/{path.name}")
        server.client.put_object(Bucket="models", Key="adapters/sql/training.log", Body=bytes(1 << 16))
        server.client.put_object(Bucket="models", Key="adapters/half/adapter_config.json", Body=b"{}")
        server.client.put_object(Bucket="models", Key="adapters/none/README.txt", Body=b"soon")
        use_s3(monkeypatch, server.proxy.url)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(s3_client, "_FIRST_DELAY_S", 0.001)
        yield server


def test_from_s3_the_same_numbers_come_and_once_only(s3: S3Server, base: str, adapter: Path) -> None:
    here = read(str(adapter), base)
    there = read("s3://models/adapters/sql", base)
    assert there.ranks == here.ranks
    for key in here.ranks:
        mine, theirs = here.factors(key), there.factors(key)
        assert mine is not None
        assert theirs is not None
        assert np.array_equal(mine.a, theirs.a)
        assert np.array_equal(mine.b, theirs.b)
    fetched = {each.path.rpartition("/")[2] for each in s3.proxy.downloads}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}, "and nothing else of the prefix"
    s3.proxy.clear()
    read("s3://models/adapters/sql", base)
    assert not s3.proxy.downloads, "the node has it"


@pytest.mark.usefixtures("s3")
def test_an_engine_takes_one_from_s3(base: str) -> None:
    options = {"enable_lora": True, "num_blocks": 16, "adapters": {"sql": "s3://models/adapters/sql"}}
    engine = LLMEngine.from_options(base, EngineConfig.from_dict(options))
    assert engine.adapter_names == ["sql"]
    engine.add_adapter("sql", "s3://models/adapters/sql")


def test_what_is_not_there_is_said(s3: S3Server, base: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="adapter a: s3://models/adapters/gone: no object is there"):
        read("s3://models/adapters/gone", base)
    with pytest.raises(ModelLoadError, match=r"s3://models/adapters/none: adapter_config.json is missing"):
        open_adapter("s3://models/adapters/none")
    with pytest.raises(ModelLoadError, match="adapter a: "):
        read("s3://models/adapters/half", base)
    with pytest.raises(ModelLoadError, match="no such folder"):
        open_adapter(str(tmp_path / "gone"))
    with pytest.raises(ModelLoadError, match=r"expected hf:org/name"):
        open_adapter("hf:name")
    s3.proxy.status = lambda: 403
    with pytest.raises(ModelLoadError, match="adapter a: s3://models/adapters/sql"):
        read("s3://models/adapters/sql", base)


def test_from_the_hub_and_then_without_it(base: str, adapter: Path, tmp_path: Path) -> None:
    with running_hub({path.name: path.read_bytes() for path in adapter.iterdir()}) as hub:

        def told(source: str, **environment: str) -> str:
            # The library reads its environment as it is imported.
            done = subprocess.run(
                [sys.executable, "-c", READ, source, base],
                cwd=ROOT,
                env={"PATH": "", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": hub.url}
                | environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
            return done.stdout.strip()

        expected = read(str(adapter), base).factors("layers.1.down")
        assert expected is not None
        assert told("hf:org/tiny") == str(expected.b.sum())
        hub.asked.clear()
        assert told("hf:org/tiny", HF_HUB_OFFLINE="1") == str(expected.b.sum())
        assert hub.asked == []
        assert "no such repository" in told("hf:org/none")
