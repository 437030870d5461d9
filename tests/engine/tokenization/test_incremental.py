"""Streamed text equals the whole text, and no piece shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenization import IncrementalDetokenizer, Tokenizer, tokenizer_from_gguf
from tests.engine.tokenization.vocabularies import sentencepiece_metadata, smollm2


def spiece() -> Tokenizer:
    return tokenizer_from_gguf(sentencepiece_metadata(), "x")


def stream(
    tokenizer: Tokenizer, ids: list[int], chunk: int = 1, skip: bool = True, continuation: bool = False
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip, continuation)
    pieces = [detokenizer.append(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("text", ["🎉👩‍👩‍👧 party", "日本語のテキスト", "naïve Ångström", "😀" * 5])
@pytest.mark.parametrize("tokenizer", [smollm2(), spiece()], ids=["byte-level", "sentencepiece"])
def test_only_whole_characters_are_released(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    ids = spiece().encode("日", add_special_tokens=False)[1:]
    assert stream(spiece(), ids) == ["", "", "日", ""]
    assert stream(spiece(), ids[:2]) == ["", "", "\ufffd"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20), st.integers(1, 5), st.booleans())
def test_any_ids_stream_to_the_whole_decode(ids: list[int], chunk: int, skip: bool) -> None:
    assert "".join(stream(smollm2(), ids, chunk, skip)) == smollm2().decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 280), max_size=20), st.integers(1, 5), st.booleans(), st.booleans())
def test_sentencepiece_ids_too(ids: list[int], chunk: int, skip: bool, continuation: bool) -> None:
    tokenizer = spiece()
    pieces = stream(tokenizer, ids, chunk, skip, continuation)
    assert "".join(pieces) == tokenizer.decode(ids, skip, continuation)
