"""A waiting thread sleeps until the word changes, is woken, or has waited long enough."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from engine.control.futex import futex_wait, futex_wake, futexes_work

pytestmark = pytest.mark.skipif(not futexes_work(), reason="needs Linux on x86-64")


def test_a_word_that_differs_already_is_not_waited_for() -> None:
    word = ctypes.c_uint32(5)
    assert futex_wait(ctypes.addressof(word), 4, 10.0)


def test_the_timeout_ends_the_wait() -> None:
    word = ctypes.c_uint32((1 << 32) - 1)
    began = time.monotonic()
    assert not futex_wait(ctypes.addressof(word), (1 << 32) - 1, 0.05)
    assert 0.04 < time.monotonic() - began < 5.0


def test_a_sleeper_is_woken() -> None:
    word = ctypes.c_uint32(0)
    woken: list[bool] = []
    sleeper = threading.Thread(target=lambda: woken.append(futex_wait(ctypes.addressof(word), 0, 30.0)))
    sleeper.start()
    time.sleep(0.05)
    word.value = 1
    futex_wake(ctypes.addressof(word))
    sleeper.join(10.0)
    assert woken == [True]
