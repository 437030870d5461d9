"""Encoding, decoding, saving; decoding against the tokenizers library's own."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer

from engine.errors import ModelLoadError, RequestError, UnsupportedModelError
from engine.tokenization import Tokenizer, tokenizer_from_gguf, tokenizer_from_hf_folder
from tests.engine.tokenization.vocabularies import sentencepiece_metadata, smollm2


def spiece() -> Tokenizer:
    return tokenizer_from_gguf(sentencepiece_metadata(), "x")


TEXTS = ["Hello, world!", " two  spaces ", "1234567", "naïve 日本語 🎉👩‍👩‍👧", "a\n\n\tb\r\n", "", "\x00\x7f", "𝔘𝔫𝔦"]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trip(text: str) -> None:
    assert smollm2().decode(smollm2().encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_round_trip(text: str) -> None:
    assert spiece().decode(spiece().encode(text)) == text


@cache
def known_bytes() -> set[bytes]:
    """The bytes that are tokens of their own."""
    present = {token for i in range(49152) if len(token := smollm2().token_bytes(i)) == 1}
    assert 200 < len(present) < 256
    return present


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_but_for_bytes_that_the_vocabulary_lacks(text: str) -> None:
    """SmolLM2 has no tokens for a few control bytes; as in Hugging Face's own, they vanish."""
    kept = b"".join(byte for value in text.encode() if (byte := bytes([value])) in known_bytes())
    ids = smollm2().encode(text, add_special_tokens=False)
    assert smollm2().decode(ids, skip_special_tokens=False) == kept.decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20), st.booleans())
def test_byte_level_decoding_equals_the_library(ids: list[int], skip: bool) -> None:
    """Any ids: sampled text is often not valid UTF-8."""
    assert smollm2().decode(ids, skip) == smollm2()._backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.text("helo wrdé日🎉  ", max_size=12), st.booleans())
def test_sentencepiece_decoding_equals_the_library(text: str, skip: bool) -> None:
    tokenizer = spiece()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = spiece()
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    assert tokenizer.decode(ids[1:]) == "world"
    assert tokenizer.decode(ids[:1]) + tokenizer.decode(ids[1:], continuation=True) == "hello world"


def test_token_bytes_and_text() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode(" 🎉")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == " 🎉".encode()
    assert "\ufffd" in tokenizer.token_text(ids[0])
    assert tokenizer.token_text(19556) == "Hello"
    assert tokenizer.token_bytes(49152 + 7) == b""
    assert spiece().token_bytes(3 + 0xE9) == b"\xe9"


def test_a_lone_surrogate_is_the_callers_fault() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        smollm2().encode(json.loads('"\\ud800"'))


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer, text = smollm2(), "word " * 200_000
    tokenizer.encode("what is made at the first call")
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(tokenizer.encode, text)
        turns = 0
        while not encoding.done():
            turns += 1
            time.sleep(0.001)
    # One that holds the GIL throughout leaves a turn or two before it begins.
    assert turns > 10
    assert len(encoding.result()) == 200_001


def test_saved_tokenizers_load_here_and_in_transformers(tmp_path: Path) -> None:
    original = smollm2()
    original.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "1+1?"}]
    for text in TEXTS:
        assert loaded.encode(text) == original.encode(text) == theirs.encode(text)
    assert loaded.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        original.apply_chat_template(messages)
    )
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2) == (theirs.bos_token_id, theirs.eos_token_id)
    assert loaded.special_tokens == original.special_tokens


def test_saved_sentencepiece_keeps_its_bos(tmp_path: Path) -> None:
    spiece().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("hello")[0] == 1
    assert loaded.decode(loaded.encode("hello é")) == "hello é"


def write_folder(folder: Path, config: dict[str, object], **files: str) -> Path:
    smollm2().save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_chat_template_from_each_place(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    places: list[tuple[dict[str, object], dict[str, str], str]] = [
        ({"chat_template": "in config"}, {}, "in config"),
        ({}, {"chat_template__json": json.dumps({"chat_template": "in json"})}, "in json"),
        ({"chat_template": "in config"}, {"chat_template__jinja": "in jinja"}, "in jinja"),
        ({"chat_template": [{"name": "default", "template": "named"}]}, {}, "named"),
    ]
    for i, (config, files, expected) in enumerate(places):
        tokenizer = tokenizer_from_hf_folder(write_folder(tmp_path / str(i), config, **files))
        assert tokenizer is not None
        assert tokenizer.apply_chat_template(messages) == expected


def test_special_tokens_may_be_objects_or_lie_in_their_map(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_hf_folder(
        write_folder(
            tmp_path,
            {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
            special_tokens_map__json=json.dumps({"bos_token": "<|im_start|>"}),
        )
    )
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template") as raised:
        tokenizer.apply_chat_template([])
    assert raised.value.param == "messages"


def test_add_bos_token_in_the_configuration_wins(tmp_path: Path) -> None:
    config: dict[str, object] = {"bos_token": "<|im_start|>", "add_bos_token": True}
    tokenizer = tokenizer_from_hf_folder(write_folder(tmp_path, config))
    assert tokenizer is not None
    assert tokenizer.encode("Hello") == [1, 19556]
    assert tokenizer.encode("Hello", add_special_tokens=False) == [19556]
    with pytest.raises(ModelLoadError, match="add_bos_token is set without a known bos_token"):
        tokenizer_from_hf_folder(write_folder(tmp_path, {"add_bos_token": True}))


def test_truncation_for_training_does_not_shorten_prompts(tmp_path: Path) -> None:
    smollm2().save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("one two three four five six seven")) == 7


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_from_hf_folder(tmp_path) is None
    with pytest.raises(ModelLoadError, match="no tokenizer files"):
        Tokenizer.load(tmp_path)


def test_vocab_json_and_merges_of_another_class_go_through_transformers(tmp_path: Path) -> None:
    smollm2().save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = tokenizer_from_hf_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("Hello world!") == smollm2().encode("Hello world!")


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}'])
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: "):
        tokenizer_from_hf_folder(tmp_path)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC()])
def test_decoders_that_spell_no_bytes_are_refused(decoder: decoders.Decoder | None) -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(UnsupportedModelError, match=r"token decoder .* is not supported; supported: ByteLevel"):
        Tokenizer(backend, {})
