"""Stop strings: exact truncation however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.decoding.stop_checker import StopChecker, StopResult
from engine.errors import RequestError


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """(text before, stop string) by trying each end in turn: the plain definition."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return None


def run(checker: StopChecker, pieces: list[str]) -> str:
    out = ""
    for piece in pieces:
        result = checker.append(piece)
        out += result.text
        if result.stop is not None:
            return out
    return out + checker.flush()


ALPHABET = "ab\n"


@given(
    st.lists(st.text(ALPHABET, max_size=4), max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_pieces_do_not_matter(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    found = first_stop("".join(pieces), stops)
    out = run(checker, pieces)
    if found is None:
        assert (out, checker.matched) == ("".join(pieces), None)
    else:
        before, stop = found
        assert (out, checker.matched) == (before + stop if include else before, stop)


@given(st.text(ALPHABET, max_size=20), st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_is_held_without_need(text: str, stops: list[str]) -> None:
    """What is held back is exactly the longest end of the text that begins a stop string."""
    checker = StopChecker(stops)
    released = ""
    for end, character in enumerate(text, start=1):
        result = checker.append(character)
        released += result.text
        if result.stop is not None:
            return
        held = text[len(released) : end]
        starts = [text[i:end] for i in range(end) if any(stop.startswith(text[i:end]) for stop in stops)]
        assert held == (starts[0] if starts else "")


def test_a_stop_string_across_pieces() -> None:
    checker = StopChecker(["</answer>"])
    assert checker.append("42</ans") == StopResult("42", None)
    assert checker.append("wer") == StopResult("", None)
    assert checker.append("> more") == StopResult("", "</answer>")
    assert checker.append("even more") == StopResult("", "</answer>")
    assert checker.flush() == ""


def test_a_false_start_is_released() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.append("one\n\nUs") == StopResult("one", None)
    assert checker.append("ually") == StopResult("\n\nUsually", None)


def test_flush_gives_what_was_held() -> None:
    checker = StopChecker(["STOP"])
    assert checker.append("ends in STO") == StopResult("ends in ", None)
    assert (checker.flush(), checker.flush()) == ("STO", "")


def test_included_stop_strings_end_the_text() -> None:
    checker = StopChecker(["."], include_stop_str_in_output=True)
    assert checker.append("One. Two.") == StopResult("One.", ".")


def test_min_tokens_lets_stop_strings_pass() -> None:
    checker = StopChecker(["ab"])
    assert checker.append("xab", can_stop=False) == StopResult("xab", None)
    assert checker.append("xa", can_stop=False) == StopResult("x", None)
    assert checker.append("b", can_stop=False) == StopResult("ab", None)
    assert checker.append("ya", can_stop=False) == StopResult("y", None)
    assert checker.append("b!") == StopResult("", "ab")  # begun before, complete after


def test_no_stop_strings_hold_nothing() -> None:
    assert StopChecker([]).append("text") == StopResult("text", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="must not be empty") as raised:
        StopChecker(["x", ""])
    assert raised.value.param == "stop"
