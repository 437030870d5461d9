"""How csrc/cuda shares attention out over CTAs: the arithmetic of attention_plan.h, compiled for the CPU."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
SOURCE = """
#include "attention_plan.h"
extern "C" int64_t count(int64_t runs, int64_t max) { return quire::cut_shares(runs, max).count; }
extern "C" int64_t begin(int64_t runs, int64_t max, int64_t share) { return quire::cut_shares(runs, max).begin(share); }
extern "C" int64_t of_run(int64_t runs, int64_t max, int64_t run) { return quire::cut_shares(runs, max).of_run(run); }
extern "C" int64_t max_shares(int64_t ctas, int64_t heads) { return quire::max_shares_of_head(ctas, heads); }
extern "C" int64_t min_runs() { return quire::kMinRunsOfShare; }
extern "C" int64_t splits(int64_t busy, int64_t ctas, int64_t length, int64_t fixed, int64_t* tokens) {
    const auto splits = quire::plan_splits(busy, ctas, static_cast<int32_t>(length), static_cast<int32_t>(fixed));
    *tokens = splits.tokens;
    return splits.count;
}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    options = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run(["g++", *options, folder / "plan.cpp", "-o", folder / "plan.so"], check=True)
    library = ctypes.CDLL(str(folder / "plan.so"))
    for name, arguments in (("count", 2), ("begin", 3), ("of_run", 3), ("max_shares", 2), ("min_runs", 0)):
        getattr(library, name).argtypes = [ctypes.c_int64] * arguments
        getattr(library, name).restype = ctypes.c_int64
    library.splits.argtypes = [*[ctypes.c_int64] * 4, ctypes.POINTER(ctypes.c_int64)]
    library.splits.restype = ctypes.c_int64
    return library


@given(runs=st.integers(0, 400), max_shares=st.integers(1, 80))
def test_shares_are_equal_and_cover_all_runs(plan: ctypes.CDLL, runs: int, max_shares: int) -> None:
    count = plan.count(runs, max_shares)
    begins = [plan.begin(runs, max_shares, share) for share in range(max_shares + 1)]
    sizes = [after - before for before, after in itertools.pairwise(begins)]
    assert begins[0] == 0
    assert begins[-1] == runs
    assert max(sizes[:count]) - min(sizes[:count]) <= 1
    assert sum(sizes[count:]) == 0, "CTAs beyond the shares in use have nothing to do"
    assert count == 1 or min(sizes[:count]) >= plan.min_runs()
    for run in range(runs):
        share = plan.of_run(runs, max_shares, run)
        assert begins[share] <= run < begins[share + 1]


def test_shares_of_very_many_tokens_do_not_overflow(plan: ctypes.CDLL) -> None:
    """4,096 sequences of 2^31 - 1 tokens, in runs of 32, over 10,000 CTAs."""
    runs = 4096 * (2**26)
    assert plan.begin(runs, 10_000, 9_999) == runs * 9_999 // 10_000
    assert plan.of_run(runs, 10_000, runs - 1) == 9_999


def test_few_ctas_give_each_head_one_share(plan: ctypes.CDLL) -> None:
    assert plan.max_shares(264, 8) == 33
    assert plan.max_shares(264, 264) == 1
    assert plan.max_shares(264, 1000) == 1


@given(
    busy=st.integers(0, 5000),
    ctas=st.integers(1, 1000),
    length=st.integers(0, 2**31 - 1),
    fixed=st.sampled_from([0, 64, 2048]),
)
def test_splits_cover_the_longest_sequence(plan: ctypes.CDLL, busy: int, ctas: int, length: int, fixed: int) -> None:
    tokens_of = ctypes.c_int64()
    count, tokens = plan.splits(busy, ctas, length, fixed, ctypes.byref(tokens_of)), tokens_of.value
    assert tokens % 64 == 0
    assert (count - 1) * tokens < max(length, 1)
    if fixed:
        assert tokens == fixed
        assert count * tokens >= length
    else:
        assert count * tokens >= min(length, 2**31 - 64)
        # One split has at most 2^31 - 64 tokens, the largest number of whole tiles.
        assert count == 1 or length > 2**31 - 64 or (count * max(busy, 1) <= ctas and tokens >= 512)


def test_a_short_prompt_over_a_long_context_is_split(plan: ctypes.CDLL) -> None:
    tokens = ctypes.c_int64()
    assert plan.splits(8, 264, 100_000, 0, ctypes.byref(tokens)) == 33
    assert tokens.value == 3072  # 100,000 / 33, up to a whole tile
