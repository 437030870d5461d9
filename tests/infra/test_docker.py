"""infra/docker: each Dockerfile parses, does not run as root, and installs as the Makefile does, which CI runs."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest

from app.cli.config_file import load_config
from app.cli.ray_environment import environment
from tests.infra.dockerfile import dockerfile_problems, parse, pip_installs, split_shell

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "infra" / "docker").iterdir() if path.suffix != ".dockerignore")


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


def test_a_file(path: Path) -> None:
    assert dockerfile_problems(path.read_text()) == []


def made_by_make() -> list[list[str]]:
    """The `pip install`s of `make setup`, in the same form; the one of a model for tests alone is part of an `if`."""
    lines = re.findall(r"^\t\$\(PIP\) install (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [split_shell(line.replace("$(PIP_ARGS) ", "").replace("$$", "$")) for line in lines]


def test_each_install_is_one_that_ci_runs(path: Path) -> None:
    """CI's `make setup` runs the same, but for the project itself: editable there, with what the tests need."""
    ours = pip_installs(parse(path.read_text()))
    theirs = made_by_make()
    assert len(theirs) == 4
    project = ["-c", "constraints.txt", "--no-build-isolation"]
    assert [*project, "-e", ".[dev]"] in theirs
    assert [*project, "."] in ours
    known = [each for each in theirs if "-e" not in each]
    # Tools that the extra `dev` brings there.
    tools = [
        ["-c", "constraints.txt", *names] for names in (["scikit-build-core", "cmake", "ninja"], ["cmake", "ninja"])
    ]
    for install in ours:
        assert install in [*known, *tools, [*project, "."]], f"nothing in CI runs pip install {shlex.join(install)}"
    for install in known:
        assert any(set(install) <= set(other) for other in ours), f"missing: pip install {shlex.join(install)}"


def test_the_kernels_are_built_as_ci_builds_them() -> None:
    (step,) = (
        each.value for each in parse((ROOT / "infra/docker/Dockerfile.cuda").read_text()) if "cmake -S" in each.value
    )
    makefile = (ROOT / "Makefile").read_text()
    for option in ("-S csrc", "-G Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DQUIRE_LIBRARY_DIR="):
        assert option in step
        assert option in makefile
    declared = (
        "".join(file.read_text() for file in (ROOT / "csrc").glob("*.*ake*"))
        + (ROOT / "csrc/CMakeLists.txt").read_text()
    )
    for option in re.findall(r"-D(QUIRE_\w+)", step):
        assert option in declared, f"csrc knows no {option}"


def test_the_environment_is_what_the_application_asks_for(path: Path) -> None:
    """Ray reads it once, as its processes start, and no config can set it."""
    wanted = environment(load_config(ROOT / "serve_configs" / "production.yaml"))
    (given,) = (each.value for each in parse(path.read_text()) if each.instruction == "ENV")
    values = dict(word.split("=", 1) for word in shlex.split(given.replace("\\\n", " ")))
    assert {name: values.get(name) for name in wanted} == wanted


def test_the_context_is_what_is_copied(path: Path) -> None:
    ignore = (path.parent / f"{path.name}.dockerignore").read_text().splitlines()
    assert ignore[0] == "*", "nothing goes by itself"
    let_in = [line[1:] for line in ignore if line.startswith("!")]
    for step in parse(path.read_text()):
        if step.instruction == "COPY" and "--from" not in step.value:
            for source in step.value.split()[:-1]:
                assert any(fnmatch(source, pattern) for pattern in let_in), f"{source} is not in the context"


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("USER 1000:1000", "USER root", "runs as root"),
        ("USER 1000:1000\n", "", "runs as root"),
        ("python:3.11.14-slim-bookworm", "python:latest", "is not pinned"),
        ("--from=build", "--from=builder", "no stage builder before"),
        ("COPY csrc csrc", "COPY src csrc", "no src to copy"),
        ("-c constraints.txt scikit", "scikit", "pip without constraints"),
        ("--no-install-recommends ", "", "leaves more than it must"),
        ("CMD [", "CMD python -m app serve [", "no CMD in exec form"),
        ("WORKDIR /src", "WROKDIR /src", "WROKDIR is unknown"),
    ],
)
def test_a_mistake_is_caught(right: str, wrong: str, problem: str) -> None:
    text = (ROOT / "infra" / "docker" / "Dockerfile.cpu").read_text()
    assert right in text
    found = dockerfile_problems(text.replace(right, wrong))
    assert any(problem in each for each in found), found
