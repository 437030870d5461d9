"""What is wrong with a folder of Terraform files: syntax, references to what is not declared, what nothing uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2

_REFERENCE = re.compile(r"(?<![\w.\"/])(?P<data>data\.)?(?P<kind>var|local|module|aws_\w+)\.(?P<name>[A-Za-z_]\w*)")
_EXPRESSION = re.compile(r"\$\{(.*?)\}")


def terraform_problems(folder: Path) -> list[str]:
    """One line for each; nothing is asked of a provider, so attributes of resources are not known."""
    parsed = {}
    for path in sorted(folder.glob("*.tf")):
        try:
            parsed[path.name] = hcl2.loads(path.read_text())
        except Exception as error:
            return [f"{path.name}: {str(error).splitlines()[0]}"]
    declared, found = set(), []
    for name, content in parsed.items():
        for each in _declared(content):
            if each in declared:
                found.append(f"{name}: {each} is declared twice")
            declared.add(each)
    used = set()
    for name, content in parsed.items():
        for reference in _references(content):
            used.add(reference)
            if reference not in declared:
                found.append(f"{name}: {reference} is not declared")
    found += [f"{each} is never used" for each in sorted(declared - used) if each.startswith(("var.", "local."))]
    for name, content in parsed.items():
        for blocks in content.get("variable", []):
            for variable, body in blocks.items():
                missing = {"type", "description"} - body.keys()
                found += [f"{name}: variable {_bare(variable)} has no {key}" for key in sorted(missing)]
    providers = [_bare(key) for content in parsed.values() for each in content.get("provider", []) for key in each]
    if not any("required_providers" in str(content.get("terraform", "")) for content in parsed.values()):
        found.append("no provider is pinned")
    if providers != ["aws"]:
        found.append(f"providers are {providers}")
    return found


def _bare(text: str) -> str:
    return text.strip('"')


def _declared(content: dict[str, Any]) -> Iterator[str]:
    for block, prefix in (("variable", "var."), ("module", "module.")):
        for each in content.get(block, []):
            yield from (prefix + _bare(name) for name in each)
    for each in content.get("locals", []):
        yield from (f"local.{_bare(name)}" for name in each if not name.startswith("__"))
    for block, prefix in (("resource", ""), ("data", "data.")):
        for each in content.get(block, []):
            for kind, named in each.items():
                yield from (f"{prefix}{_bare(kind)}.{_bare(name)}" for name in named)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _references(key)
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
    elif isinstance(node, str):
        for expression in _EXPRESSION.findall(node) if "${" in node else []:
            for match in _REFERENCE.finditer(expression):
                yield f"{match['data'] or ''}{match['kind']}.{match['name']}"
