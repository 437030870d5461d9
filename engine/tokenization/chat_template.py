"""Chat templates: the Jinja programs that checkpoints carry, run in a sandbox as Hugging Face runs them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import ModelLoadError, RequestError


class ChatTemplate:
    """Messages to the text that the model was trained on.

    Args:
        source: one template, or several by name; "tool_use" is taken for requests with tools, "default" otherwise.
        special_tokens: what templates know as `bos_token`, `eos_token` and so on.

    Raises:
        ModelLoadError: a template does not compile.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        sources = {"default": source} if isinstance(source, str) else source
        if "default" not in sources:
            raise ModelLoadError(f"chat template: none is named 'default' among {', '.join(sorted(sources))}")
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"chat template: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **kwargs: Any) -> str:
        """The prompt's text. A template that fails, or refuses, is a RequestError: messages steer it."""
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self._templates else "default"
        context = {**self._special_tokens, "tools": None, "documents": None, **kwargs}
        try:
            return self._templates[name].render(
                messages=messages, add_generation_prompt=add_generation_prompt, **context
            )
        except Exception as error:  # a template is a program over the caller's data: it can raise anything
            raise RequestError(f"the chat template failed: {error}", param="messages") from error


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 declares a mutable set and only reads it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which models have not seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  # the name that templates use
    return datetime.datetime.now().strftime(format)  # local time, as templates were written for
