"""The balancer's core in C++ (csrc/balancer): the same choices as CheapestPolicy's, sooner.

Its library is looked for where the engine's are: in the folder that QUIRE_LIBRARY_PATH names or, without it, in
`engine/kernels/lib`. Without one the balancer does all in Python. One difference: here 64 bits of a block's hash stand
for the block.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import weakref
from array import array
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from pathlib import Path

import engine
from app.balancer.cost import CostWeights, RequestCost
from app.balancer.fleet import Fleet
from app.balancer.policy import CheapestPolicy, Choice
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_ABI_VERSION = 1
_POINTER, _I64, _F64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_PUBLISHED, _EXPECTED = 0, 1


_COLUMNS = (
    *("free_at", "prefill_rates", "decode_step_s", "decode_sequence_s", "cache_age_s", "heard_at"),
    *("num_sequences", "num_free_blocks", "num_empty_blocks", "num_blocks_taken", "block_sizes"),
)


class _FleetView(ctypes.Structure):
    """QuireFleetView: columns of a Fleet."""

    _fields_ = [("num_slots", _I64), *((name, _POINTER) for name in _COLUMNS)]


class _ChoiceParams(ctypes.Structure):
    """QuireChoiceParams."""

    _fields_ = [
        ("chain", _POINTER),
        ("among", ctypes.c_char_p),
        *(
            (name, _I64)
            for name in ("chain_length", "among_bytes", "prompt_tokens", "block_size", "output_tokens", "num_sequences")
        ),
        *(
            (name, _F64)
            for name in ("now", "crowding", "reuse", "reuse_half_life_s", "silent_after_s", "mean_prefill_s")
        ),
        ("slot", _I64),
        ("num_cached_blocks", _I64),
        ("cost_s", _F64),
    ]


@cache
def _library(folder: str | None) -> ctypes.PyDLL | None:
    """The library, loaded once; None if there is none. Calls keep the interpreter's lock: they take microseconds."""
    where = Path(folder) if folder is not None else Path(engine.__file__).parent / "kernels" / "lib"
    path = where / "libquire_balancer.so"
    if not path.is_file():
        logger.info("balancing in Python: %s does not exist; it is built with the kernels", path)
        return None
    try:
        library = ctypes.PyDLL(str(path))
    except OSError as error:
        logger.warning("balancing in Python: %s does not load: %s", path, error)
        return None
    version = library.quire_balancer_abi_version()
    if version != _ABI_VERSION:
        raise ConfigError(f"{path} has ABI version {version}, this package needs {_ABI_VERSION}: build it again")
    signatures = {
        "create": (_POINTER, []),
        "destroy": (None, [_POINTER]),
        "attach": (None, [_POINTER, ctypes.POINTER(_FleetView)]),
        "store": (_INT, [_POINTER, _INT, _I64, _POINTER, _I64]),
        "remove": (_INT, [_POINTER, _INT, _I64, _POINTER, _I64]),
        "drop": (_INT, [_POINTER, _INT, _I64]),
        "num_blocks": (_I64, [_POINTER, _INT]),
        "order_put": (_INT, [_POINTER, _I64, _F64]),
        "order_remove": (_INT, [_POINTER, _I64]),
        "first_after": (_F64, [_POINTER, _F64]),
        "choose": (_INT, [_POINTER, _POINTER]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"quire_balancer_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def is_available() -> bool:
    """Whether the library is there. Raises ConfigError if it is of another version."""
    return _library(os.environ.get("QUIRE_LIBRARY_PATH")) is not None


class _Core:
    """One balancer's C++ object, and the functions that take it."""

    def __init__(self) -> None:
        library = _library(os.environ.get("QUIRE_LIBRARY_PATH"))
        assert library is not None, "is_available() says so"
        self.handle = library.quire_balancer_create()
        if not self.handle:
            raise MemoryError("the balancer's core")
        weakref.finalize(self, library.quire_balancer_destroy, self.handle)
        self.attach = library.quire_balancer_attach
        self.store = library.quire_balancer_store
        self.remove = library.quire_balancer_remove
        self.drop = library.quire_balancer_drop
        self.num_blocks = library.quire_balancer_num_blocks
        self.order_put = library.quire_balancer_order_put
        self.order_remove = library.quire_balancer_order_remove
        self.first_after = library.quire_balancer_first_after
        self.choose = library.quire_balancer_choose


class NativeIndex:
    """As PrefixIndex; dropping a replica looks through the whole index."""

    def __init__(self, core: _Core, which: int) -> None:
        self._core = core
        self._which = which

    def __len__(self) -> int:
        return int(self._core.num_blocks(self._core.handle, self._which))

    def store(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks now; some it may have held before."""
        keys = _keys(hashes)
        _check(self._core.store(self._core.handle, self._which, slot, keys.buffer_info()[0], len(keys)))

    def remove(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks no more; those it did not hold are no error."""
        keys = _keys(hashes)
        _check(self._core.remove(self._core.handle, self._which, slot, keys.buffer_info()[0], len(keys)))

    def replace(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks and no others."""
        self.drop(slot)
        self.store(slot, hashes)

    def drop(self, slot: int) -> None:
        """Forget a replica."""
        _check(self._core.drop(self._core.handle, self._which, slot))


class NativeOrder:
    """As LoadOrder."""

    def __init__(self, core: _Core) -> None:
        self._core = core
        self._num_slots = 0
        self._slots: set[int] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, slot: int, free_at: float) -> None:
        """Add a slot, or move it."""
        self._slots.add(slot)
        _check(self._core.order_put(self._core.handle, slot, free_at))

    def remove(self, slot: int) -> None:
        """Take a slot out; it must be in."""
        self._slots.remove(slot)
        _check(self._core.order_remove(self._core.handle, slot))

    def first_after(self, time_s: float) -> float | None:
        """The next time after this at which a slot becomes free."""
        first = float(self._core.first_after(self._core.handle, time_s))
        return first if math.isfinite(first) else None


class NativeFleet(Fleet):
    """A Fleet whose index and order are native. Its columns stay Python's; the core reads them where they lie."""

    def __init__(self) -> None:
        self.core = _Core()
        super().__init__(NativeIndex(self.core, _PUBLISHED), NativeIndex(self.core, _EXPECTED), NativeOrder(self.core))

        self._chain: Sequence[Hashable] = ()
        self._keys = _keys(())

    def keys_of(self, chain: Sequence[Hashable]) -> array[int]:
        """The chain's hashes as the core takes them; kept for the next call, which is mostly for the same chain."""
        if chain is not self._chain:
            self._chain, self._keys = chain, _keys(chain)
        return self._keys

    def expect(self, slot: int, chain: Sequence[Hashable], first: int) -> None:
        keys = self.keys_of(chain)
        address, length = keys.buffer_info()
        _check(self.core.store(self.core.handle, _EXPECTED, slot, address + 8 * first, length - first))

    def _moved(self) -> None:
        view = _FleetView(len(self.replica_ids))
        for name in _COLUMNS:
            setattr(view, name, getattr(self, name).buffer_info()[0])
        self.core.attach(self.core.handle, ctypes.byref(view))


class NativeCheapestPolicy(CheapestPolicy):
    """CheapestPolicy, computed by the core of a NativeFleet."""

    def __init__(self, weights: CostWeights | None = None) -> None:
        super().__init__(weights)
        self._params = _ChoiceParams(**self.weights._asdict())
        self._address = ctypes.addressof(self._params)
        self._among = -1

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        assert isinstance(fleet, NativeFleet), "made together"
        params = self._params
        keys = fleet.keys_of(request.block_hashes)
        params.chain, params.chain_length = keys.buffer_info()
        if among is not self._among:
            self._among = among
            params.among_bytes = num_bytes = among.bit_length() // 8 + 1
            params.among = among.to_bytes(num_bytes, "little")
        params.prompt_tokens, params.output_tokens, params.num_sequences, _, params.block_size = request
        params.now, params.silent_after_s = fleet.now, fleet.silent_after_s
        params.crowding, params.mean_prefill_s = self.crowding(fleet), self.lane_mean_s(fleet)
        _check(fleet.core.choose(fleet.core.handle, self._address))
        return Choice(params.slot, params.num_cached_blocks, params.cost_s)


def _keys(hashes: Iterable[Hashable]) -> array[int]:
    return array("q", map(hash, hashes))


def _check(status: int) -> None:
    if status:
        raise MemoryError("the balancer's core")
