"""What is wrong with a Dockerfile, as far as can be told without building it."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
_INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "CMD"}


class Step(NamedTuple):
    instruction: str
    value: str
    line: int


def parse(text: str) -> list[Step]:
    """Instructions in order, without comments; continued lines are joined."""
    parser = DockerfileParser(fileobj=io.BytesIO(text.encode()), env_replace=False)
    return [
        Step(each["instruction"], each["value"], each["startline"] + 1)
        for each in parser.structure
        if each["instruction"] != "COMMENT"
    ]


def split_shell(command: str) -> list[str]:
    """Words of a command; "$(...)" stays one of them."""
    return shlex.split(command.replace('"$(', "'$(").replace(')"', ")'"))


def pip_installs(steps: list[Step]) -> list[list[str]]:
    """Arguments of each `pip install`, without the interpreter, caches and indices: what is installed, and how."""
    found = []
    for step in steps:
        for command in re.split(r"&&|;", step.value) if step.instruction == "RUN" else []:
            if " pip install " in f" {command} ":
                words = shlex.split(
                    command.replace('"$(grep', "'$(grep").replace('constraints.txt)"', "constraints.txt)'")
                )
                words = words[words.index("install") + 1 :]
                found.append([word for word in words if word not in ("--no-cache-dir", "${PIP_ARGS}")])
    return found


def dockerfile_problems(text: str) -> list[str]:
    steps = parse(text)
    found = [
        f"line {each.line}: {each.instruction} is unknown" for each in steps if each.instruction not in _INSTRUCTIONS
    ]
    arguments = {}
    stages: list[str] = []
    user = ""
    for step in steps:
        if step.instruction == "ARG" and not stages:
            name, _, value = step.value.partition("=")
            arguments[name] = value
        elif step.instruction == "FROM":
            image, *rest = step.value.split()
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), image)
            if image not in stages and not re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*", image):
                found.append(f"line {step.line}: the image {image!r} is not pinned")
            stages.append(rest[1] if rest else "")
            user = ""
        elif step.instruction == "USER":
            user = step.value
        elif step.instruction == "COPY":
            found += _copy_problems(step, stages)
        elif step.instruction == "RUN":
            if "apt-get install" in step.value:
                if "--no-install-recommends" not in step.value or "rm -rf /var/lib/apt/lists" not in step.value:
                    found.append(f"line {step.line}: apt-get leaves more than it must")
                if "apt-get update" not in step.value:
                    found.append(f"line {step.line}: apt-get install without update")
            if " pip install " in step.value and "-c constraints.txt" not in step.value:
                found.append(f"line {step.line}: pip without constraints")
            if "pip install" in step.value and "--no-cache-dir" not in step.value:
                found.append(f"line {step.line}: pip keeps its cache")
    if len(stages) < 2:
        found.append("one stage: compilers stay in the image")
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        found.append(f"runs as {user or 'root'}: Kubernetes wants a number above 0")
    if not steps or steps[-1].instruction != "CMD" or not steps[-1].value.startswith("["):
        found.append("no CMD in exec form at the end")
    return found


def _copy_problems(step: Step, stages: list[str]) -> list[str]:
    words = step.value.split()
    if words[0].startswith("--from="):
        name = words[0].removeprefix("--from=")
        return [] if name in stages[:-1] else [f"line {step.line}: no stage {name} before"]
    return [f"line {step.line}: no {source} to copy" for source in words[:-1] if not (ROOT / source).exists()]
