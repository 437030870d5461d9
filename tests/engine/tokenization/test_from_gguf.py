"""Tokenizers built from GGUF metadata."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from transformers import GemmaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.tokenization import Tokenizer, tokenizer_from_gguf
from engine.tokenization.from_gguf import _merges_from_scores
from engine.tokenization.pre_tokenizers import build_pre_tokenizer, pre_tokenizer_rule
from tests.engine.tokenization.vocabularies import (
    CORPUS,
    byte_level_metadata,
    gemma_metadata,
    sentencepiece_metadata,
    smollm2,
    trained_bpe,
)


def pieces(pre: str, text: str) -> list[str]:
    """Pieces that the rule cuts `text` into, as text."""
    split = build_pre_tokenizer(pre_tokenizer_rule(pre, "x")).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


# Ids as llama.cpp's and Hugging Face's tokenizers of SmolLM2 give them: each digit is a token of its own.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello 1234 world!", [19556, 216, 33, 34, 35, 36, 905, 17]),
        ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
    ],
)
def test_smollm2_ids(text: str, ids: list[int]) -> None:
    assert smollm2().encode(text) == ids


def test_smollm2_special_tokens() -> None:
    tokenizer = smollm2()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.is_special(2)
    assert tokenizer.decode([19556, 2]) == "Hello"
    assert tokenizer.decode([19556, 2], skip_special_tokens=False) == "Hello<|im_end|>"


def test_digits_stand_alone_in_smollm() -> None:
    assert pieces("smollm", "in 2024: x10") == ["in", " ", "2", "0", "2", "4", ":", " x", "1", "0"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_smollm_cuts_as_its_tokenizer_json(text: str) -> None:
    """Its authors write the rule as Digits, then GPT-2's ByteLevel."""
    published = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = build_pre_tokenizer(pre_tokenizer_rule("smollm", "x"))
    assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_gpt2_cuts_as_the_library_does(text: str) -> None:
    ours = build_pre_tokenizer(pre_tokenizer_rule("gpt-2", "x"))
    assert ours.pre_tokenize_str(text) == pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "45", " €\n\n", "  ", " ok"]),
        ("qwen2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €\n\n", "  ", " ok"]),
        ("gpt-2", ["I", "'", "LL", " pay", " 12345", " €", "\n\n  ", " ok"]),
        ("tekken", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €\n\n", "  ", " ok"]),
        ("default", ["I", "'", "LL", " pay", " ", "123", "45", " €", "\n\n  ", " ok"]),
    ],
)
def test_rules_differ_where_their_models_do(pre: str, expected: list[str]) -> None:
    text = "I'LL pay 12345 €\n\n   ok"
    assert pieces(pre, text) == expected
    assert "".join(expected) == text


@pytest.mark.parametrize("text", [*CORPUS[:3], "", " ", "I've 99 problems"])
def test_byte_level_ids_equal_the_trained_tokenizer(text: str) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata("gpt-2"), "x")
    assert tokenizer.encode(text) == trained_bpe().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_whole_words_win_over_merges_in_llama3() -> None:
    """`ignore_merges`: a vocabulary entry that no merge reaches is still found."""
    metadata = byte_level_metadata("llama-bpe", add_bos_token=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens.append("unreachable")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert tokenizer_from_gguf(metadata, "x").encode("unreachable") == [len(tokens) - 1]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert len(tokenizer_from_gguf(metadata, "x").encode("unreachable")) > 1


@pytest.mark.parametrize(
    ("pre", "changes", "first", "last"),
    [
        ("gpt-2", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_special_tokens_around_a_text(pre: str, changes: dict[str, Any], first: bool, last: bool) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(pre, **changes), "x")
    ids = tokenizer.encode("Hello")
    assert (ids[0] == 0, ids[-1] == 1) == (first, last)
    assert not {0, 1} & set(tokenizer.encode("Hello", add_special_tokens=False))


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(), "x")
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    named = [tokens[i] for i in tokenizer.encode("hello world é日")]
    assert named == ["<s>", "▁hello", "▁world", "▁", "é", "<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.decode(tokenizer.encode("hello world é日")) == "hello world é日"
    assert [tokens[i] for i in tokenizer.encode("hello<|tool|>", add_special_tokens=False)] == ["▁hello", "<|tool|>"]


def test_user_defined_tokens_are_text_and_control_tokens_are_not() -> None:
    """Gemma's line breaks and indents are user-defined tokens: decoding dropped them."""
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(), "x")
    ids = tokenizer.encode("hello<|tool|></s>")
    assert tokenizer.decode(ids) == "hello<|tool|>"
    assert [tokenizer.is_special(i) for i in ids] == [True, False, False, True]


def test_sentencepiece_without_the_leading_space() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False), "x")
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("hello")] == ["he", "llo"]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


@settings(max_examples=200, deadline=None)
@given(st.text("helowrd é日\n\t <b>", max_size=30))
def test_a_vocabulary_like_gemmas_cuts_as_transformers_does(text: str) -> None:
    """No leading space; runs of spaces and line breaks are user-defined tokens, spelled with spaces in GGUF files."""
    ours, theirs = gemma_tokenizers()
    ids = ours.encode(text)
    assert ids == [1, *theirs.encode(text, add_special_tokens=False)]
    assert ours.decode(ids) == text


@cache
def gemma_tokenizers() -> tuple[Tokenizer, GemmaTokenizer]:
    """Ours from a GGUF file's metadata, and transformers' from the SentencePiece file that it came from."""
    metadata = gemma_metadata()
    tokens, types, scores = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    pieces = [token.replace(" ", "▁") if kind == 4 else token for token, kind in zip(tokens, types, strict=True)]
    own_scores = [0.0 if kind == 4 else score for score, kind in zip(scores, types, strict=True)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    theirs = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab, dict(zip(pieces, own_scores, strict=True))))
    user_defined = [piece for piece, kind in zip(pieces, types, strict=True) if kind == 4]
    theirs.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])
    return tokenizer_from_gguf(metadata, "x"), theirs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=5), unique=True, min_size=1, max_size=30), st.randoms())
def test_merges_equal_those_of_transformers(tokens: list[str], random: Any) -> None:
    scores = [float(-i) for i in range(len(tokens))]
    random.shuffle(scores)
    vocab = {token: i for i, token in enumerate(tokens)}
    expected = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    assert _merges_from_scores(tokens, [1] * len(tokens), scores) == expected


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (
            byte_level_metadata("smollm9"),
            UnsupportedModelError,
            "pre-tokenizer 'smollm9' is not supported; supported: ",
        ),
        (byte_level_metadata("gpt-2", model="t5"), UnsupportedModelError, "tokenizer model 't5'"),
        (byte_level_metadata("gpt-2", merges=["ab"]), ModelLoadError, "'ab' is not two tokens"),
        (byte_level_metadata("gpt-2", merges=["zzz yyy"]), ModelLoadError, "tokenizer.ggml.merges: "),
        (byte_level_metadata("gpt-2", merges=None), ModelLoadError, "tokenizer.ggml.merges is missing"),
        (byte_level_metadata("gpt-2", tokens=[]), ModelLoadError, "tokenizer.ggml.tokens is missing"),
        (byte_level_metadata("gpt-2", token_type=[1]), ModelLoadError, "1 token types for 419 tokens"),
        (byte_level_metadata("gpt-2", eos_token_id=419), ModelLoadError, "eos_token_id=419 is beyond the vocabulary"),
        (sentencepiece_metadata(scores=[0.0]), ModelLoadError, "1 scores for 281 tokens"),
    ],
)
def test_faulty_metadata_is_named(metadata: dict[str, Any], error: type[ModelLoadError], message: str) -> None:
    with pytest.raises(error, match=r"^model\.gguf: ") as raised:
        tokenizer_from_gguf(metadata, "model.gguf")
    assert message in str(raised.value)


def test_a_missing_rule_is_the_default_one() -> None:
    text = "$12345 it's"
    default = tokenizer_from_gguf(byte_level_metadata("default"), "x").encode(text)
    assert tokenizer_from_gguf(byte_level_metadata(None), "x").encode(text) == default
