"""GPT-2's and OPT's folders without tokenizer.json, against transformers reading the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Tokenizer

from engine.errors import ModelLoadError
from engine.tokenization import Tokenizer, tokenizer_from_hf_folder
from tests.engine.tokenization.vocabularies import trained_bpe

TEXTS = ["Hello world!", " two  spaces ", "naïve 日本語 🎉", "a\n\n\tb\r\n", "", "1234567 tokens", "it's</s> here<pad>"]
PLAIN = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
# As its authors publish opt-125m.
OPT: dict[str, Any] = {
    "errors": "replace",
    "unk_token": {"content": "</s>", **PLAIN},
    "bos_token": {"content": "</s>", **PLAIN},
    "eos_token": {"content": "</s>", **PLAIN},
    "pad_token": {"content": "<pad>", **PLAIN},
    "add_prefix_space": False,
    "add_bos_token": True,
    "tokenizer_class": "GPT2Tokenizer",
}
OPT_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")


def write(
    folder: Path, config: dict[str, Any], first: tuple[str, ...], last: tuple[str, ...] = (), **files: Any
) -> Path:
    """vocab.json and merges.txt of a small vocabulary between special tokens, as the two models place them."""
    model = json.loads(trained_bpe().to_str())["model"]
    words = [token for token in sorted(model["vocab"], key=model["vocab"].__getitem__) if not token.startswith("<|")]
    vocab = {token: i for i, token in enumerate([*first, *words, *last])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = tokenizer_from_hf_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_opt_puts_its_end_of_text_first(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, OPT, OPT_TOKENS))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 2)
    assert tokenizer.encode("Hello")[0] == 2
    assert tokenizer.encode("Hello", add_special_tokens=False) == tokenizer.encode("Hello")[1:]
    assert tokenizer.encode("", add_special_tokens=True) == [2]
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([2, 1, *tokenizer.encode("x")]) == "x"


def test_gpt2_adds_nothing_and_defaults_to_end_of_text(tmp_path: Path) -> None:
    """Its tokenizer_config.json names no class and no token: config.json says what it is."""
    folder = write(tmp_path, {"model_max_length": 1024}, (), ("<|endoftext|>",), config__json={"model_type": "gpt2"})
    tokenizer = load(folder)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.vocab_size - 1
    assert tokenizer.is_special(tokenizer.vocab_size - 1)
    ids = tokenizer.encode("Hello<|endoftext|>")
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[:-1] == tokenizer.encode("Hello")


@pytest.mark.parametrize("kind", ["opt", "opt-stripping", "gpt2", "gpt2-prefix-space"])
def test_ids_equal_transformers(tmp_path: Path, kind: str) -> None:
    if kind.startswith("opt"):
        stripping = {"pad_token": {"content": "<pad>", **PLAIN, "lstrip": kind == "opt-stripping"}}
        write(tmp_path, OPT | stripping, OPT_TOKENS)
    else:
        prefix = kind == "gpt2-prefix-space"
        write(tmp_path, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": prefix}, (), ("<|endoftext|>",))
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    ours = load(tmp_path)
    for text in [*TEXTS, "a <pad> b"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text


def test_transformers_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load(write(tmp_path, OPT, OPT_TOKENS)).encode("Hello")


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    base = load(write(tmp_path, {"tokenizer_class": "GPT2Tokenizer"}, (), ("<|endoftext|>",))).vocab_size
    entry = {"content": "<|tool|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(base): entry | {"special": True}}
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder}
    tokenizer = load(write(tmp_path, config, (), ("<|endoftext|>",), added_tokens__json={"<|word|>": base + 1}))
    assert tokenizer.encode("<|tool|><|word|>") == [base, base + 1]
    assert tokenizer.is_special(base)
    assert not tokenizer.is_special(base + 1)

    shifted = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {str(base + 7): entry}}
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(ModelLoadError, match=rf"added token '<\|tool\|>' has id {base + 7} there, but {base} after"):
        tokenizer_from_hf_folder(write(tmp_path, shifted, (), ("<|endoftext|>",)))


@pytest.mark.parametrize(
    ("decoder", "added", "message"),
    [
        ([1], {}, r"tokenizer_config\.json: malformed added_tokens_decoder"),
        ({"600": {}}, {}, "malformed added_tokens_decoder: KeyError"),
        ({"x": {"content": "y"}}, {}, "malformed added_tokens_decoder: ValueError"),
        ({}, {"y": "600"}, r"added_tokens\.json: 'y' has the id '600', no integer"),
    ],
)
def test_malformed_added_tokens_are_named(tmp_path: Path, decoder: Any, added: dict[str, Any], message: str) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder}
    with pytest.raises(ModelLoadError, match=message):
        tokenizer_from_hf_folder(write(tmp_path, config, (), (), added_tokens__json=added))


def test_broken_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, OPT, OPT_TOKENS)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such merge\n")
    with pytest.raises(ModelLoadError, match=r"vocab\.json and merges\.txt: "):
        tokenizer_from_hf_folder(tmp_path)
