"""The kernels compiled as they are launched, for GPUs that are not there, and what ptxas says of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a CTA may have


class Compiled(NamedTuple):
    """ptxas' words: registers of a thread, bytes spilled; and the bytes of shared memory."""

    ptx: str
    registers: int
    spilled: int
    shared: int


def compile_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, object],
    capability: int,
    folder: Path,
    **options: object,
) -> Compiled:
    """Compile for a GPU of `capability`.

    Args:
        pointers: types of the arguments that are no int32; strides count as multiples of 16, as a model's are.
        options: num_warps and the like.
    """
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if signature[name].startswith("*") or (name.endswith("_stride") and name != "block_table_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]

    path = folder / "kernel.ptx"
    path.write_text(compiled.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command: list[str | Path] = [
        ptxas,
        "-v",
        f"--gpu-name={ARCHITECTURES[capability]}",
        path,
        "-o",
        folder / "kernel.cubin",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return Compiled(compiled.asm["ptx"], int(registers[1]), int(spilled[1]), compiled.metadata.shared)
