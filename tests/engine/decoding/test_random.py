from __future__ import annotations

import numpy as np

from engine.decoding.random import philox4x32, uniform


def words(counter: list[int], key: list[int]) -> list[int]:
    low = np.array([counter[0] | counter[1] << 32], dtype=np.uint64)
    high = np.array([counter[2] | counter[3] << 32], dtype=np.uint64)
    return [int(word[0]) for word in philox4x32(np.array([key[0] | key[1] << 32], dtype=np.uint64), low, high)]


def test_known_answers_of_random123() -> None:
    ones = 0xFFFFFFFF
    assert words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_uniform_is_uniform_and_depends_on_each_argument() -> None:
    count = 20_000
    zeros, numbers = np.zeros(count, dtype=np.uint64), np.arange(count, dtype=np.uint64)
    for arguments in ((numbers, zeros, zeros), (zeros, numbers, zeros), (zeros, zeros, numbers)):
        draws = uniform(*arguments)
        assert ((draws >= 0) & (draws < 1)).all()
        histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
        chi_square = ((histogram - count / 20) ** 2 / (count / 20)).sum()
        assert chi_square < 45, "19 degrees of freedom: beyond 45 once in 1,500"
        assert len(np.unique(draws)) == count
