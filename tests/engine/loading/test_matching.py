"""A checkpoint's tensors against what a model wants."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from engine.errors import ModelLoadError
from engine.loading.matching import match_tensors

WANTED = {"model.a": (2, 3), "model.b": (4,)}


class Shaped(NamedTuple):
    shape: tuple[int, ...]


A, B, OTHER = Shaped((2, 3)), Shaped((4,)), Shaped((9,))


def match(tensors: list[tuple[str, Shaped]], wanted: dict[str, tuple[int, ...]] = WANTED) -> list[tuple[str, object]]:
    unused = {"model.mask", "lm_head.weight"}
    return list(match_tensors("here", "LlamaForCausalLM", tensors, wanted, unused, "model"))


def test_each_comes_as_it_is_read_under_the_models_name() -> None:
    assert match([("model.b", B), ("model.a", A)]) == [("model.b", B), ("model.a", A)]
    assert match([("b", B), ("a", A)]) == [("model.b", B), ("model.a", A)], "a file of the bare decoder"


def test_unused_ones_are_passed_over_whatever_their_shape_and_number() -> None:
    found = match([("mask", OTHER), ("model.a", A), ("lm_head.weight", A), ("model.mask", B), ("b", B)])
    assert found == [
        ("model.mask", None), ("model.a", A), ("lm_head.weight", None), ("model.mask", None), ("model.b", B),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("model.a", A), ("model.a", A)], "here: tensor model.a occurs twice"),
        ([("model.a", A), ("a", A)], "here: tensor a occurs twice"),
        ([("model.c", A)], "here: tensor model.c has no place in LlamaForCausalLM"),
        ([("model.a", B)], r"here: tensor model.a has shape \[4\], the configuration says \[2, 3\]"),
        ([("model.a", A)], "here: missing tensors model.b$"),
        ([], "here: missing tensors model.a, model.b$"),
    ],
)
def test_what_does_not_fit_is_named(tensors: list[tuple[str, Shaped]], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        match(tensors)


def test_of_many_missing_ones_three_are_named() -> None:
    with pytest.raises(ModelLoadError, match=r"missing tensors l0, l1, l2 and 4 more$"):
        match([], {f"l{i}": (1,) for i in range(7)})
