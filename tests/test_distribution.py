from __future__ import annotations

from pathlib import Path

import pytest

from tests.distribution import FileScheduling, unit_of

ROOT = Path(__file__).parents[1]


def test_files_that_run_ray_are_one_unit_and_each_other_file_is_one() -> None:
    assert unit_of("tests/app/test_serve.py") == unit_of("tests/app/replica/test_fleet.py") == "ray"
    assert unit_of("tests/test_imports.py") == "tests/test_imports.py"


def test_a_test_belongs_to_its_files_unit() -> None:
    scheduling = FileScheduling.__new__(FileScheduling)
    assert scheduling._split_scope("tests/test_imports.py::test_x[a::b]") == "tests/test_imports.py"
    assert scheduling._split_scope("tests/app/test_serve.py::test_x") == "ray"


@pytest.mark.parametrize("start", ["ray.init(", " serving(", " elastic_serving(", '"app", "serve"'])
def test_every_file_that_starts_ray_is_marked(start: str) -> None:
    here = Path(__file__)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != here and start in path.read_text()]
    assert files
    assert [path for path in files if unit_of(str(path.relative_to(ROOT))) != "ray"] == []
