from __future__ import annotations

import pytest

from app.cli.omitting import lines_omitted


def test_only_lines_with_the_text_are_omitted(capsys: pytest.CaptureFixture[str]) -> None:
    with lines_omitted("killed on purpose"):
        print("one")
        print("(raylet) it was killed on purpose.")
        print("(raylet) it was killed on purpose.\n", end="")
        print()
        print("two")
    print("killed on purpose")
    assert capsys.readouterr().out == "one\n\ntwo\nkilled on purpose\n"
