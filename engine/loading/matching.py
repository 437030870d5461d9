"""Matches a checkpoint's tensors with what a model wants: each exactly once, in the shape that it says."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from engine.errors import ModelLoadError


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


_T = TypeVar("_T", bound=_Shaped)


def model_name(stored_name: str, wanted: Container[str], unused: Container[str], base_model_prefix: str) -> str:
    """What the model calls a stored tensor: checkpoints of the bare decoder lack the module that holds it."""
    return stored_name if stored_name in wanted or stored_name in unused else f"{base_model_prefix}.{stored_name}"


def match_tensors(
    source: str,
    architecture: str,
    tensors: Iterable[tuple[str, _T]],
    wanted: Mapping[str, tuple[int, ...]],
    unused: Collection[str],
    base_model_prefix: str,
) -> Iterator[tuple[str, _T | None]]:
    """Yield each tensor under the model's name for it as it is read, or None in place of one that is not used.

    Args:
        source, architecture: for the errors.
        wanted: shape of each tensor by name.
        unused: names that are passed over.
        base_model_prefix: checkpoints of the bare decoder have names without the module that holds it.

    Raises:
        ModelLoadError: a tensor is missing, doubled, unknown or of another shape than the configuration says.
    """
    pending = dict(wanted)
    for stored_name, tensor in tensors:
        name = model_name(stored_name, wanted, unused, base_model_prefix)
        if name in unused:
            yield name, None
            continue
        if name not in pending:
            why = "occurs twice" if name in wanted else f"has no place in {architecture}"
            raise ModelLoadError(f"{source}: tensor {stored_name} {why}")
        shape = pending.pop(name)
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(
                f"{source}: tensor {stored_name} has shape {list(tensor.shape)}, the configuration says {list(shape)}"
            )
        yield name, tensor
    if pending:
        names = sorted(pending)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelLoadError(f"{source}: missing tensors {', '.join(names[:3])}{more}")
