"""The balancer's core in C++ (csrc/balancer): what Placer does with CheapestPolicy, sooner.

Its library is looked for where the engine's are: in the folder that QUIRE_LIBRARY_PATH names or, without it, in
`engine/kernels/lib`. Without one the balancer does all in Python. One difference: here 64 bits of a block's hash stand
for the block.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import struct
import weakref
from array import array
from collections.abc import Hashable, Iterable
from functools import cache
from pathlib import Path

import engine
from app.balancer.booking import Booking
from app.balancer.fleet import Fleet
from app.balancer.placer import Placer
from app.balancer.policy import CheapestPolicy
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_ABI_VERSION = 3
_POINTER, _I64, _F64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_PUBLISHED, _EXPECTED = 0, 1


_COLUMNS = (
    *("free_at", "prefill_rates", "decode_step_s", "decode_sequence_s", "cache_age_s", "heard_at"),
    *("num_sequences", "num_free_blocks", "num_empty_blocks", "num_blocks_taken", "block_sizes"),
    *("adapter_load_s", "num_free_adapter_slots"),
)


class _FleetView(ctypes.Structure):
    """QuireFleetView: columns of a Fleet."""

    _fields_ = [("num_slots", _I64), *((name, _POINTER) for name in _COLUMNS)]


# QuirePlaceParams, written and read at once rather than field by field: what is asked, and the answer.
_QUESTION = struct.Struct("=QQqqqqqqdddddddqQq")
_ANSWER = struct.Struct("=qqdqddd")


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
        "place": (_INT, [_POINTER, _POINTER]),
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
        self.place = library.quire_balancer_place


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

    def stop_expecting(self, booking: Booking) -> None:
        address, length = packed(booking).buffer_info()
        first = booking.num_cached_blocks
        core = self.core
        _check(core.remove(core.handle, _EXPECTED, booking.slot, address + 8 * first, length - first))

    def _moved(self) -> None:
        view = _FleetView(len(self.replica_ids))
        for name in _COLUMNS:
            setattr(view, name, getattr(self, name).buffer_info()[0])
        self.core.attach(self.core.handle, ctypes.byref(view))


class NativePlacer(Placer):
    """Placer of a CheapestPolicy over a NativeFleet: a booking is one call."""

    def __init__(self, policy: CheapestPolicy, fleet: NativeFleet) -> None:
        super().__init__(policy, fleet)
        self._cheapest, self._native = policy, fleet
        self._params = bytearray(_QUESTION.size + _ANSWER.size)
        self._address = ctypes.addressof((ctypes.c_char * len(self._params)).from_buffer(self._params))
        self._among = -1
        self._bits = array("B")

    def place(self, booking: Booking, among: int, hold_s: float = math.inf, *, reserves: bool = False) -> bool:
        fleet, policy, params = self._native, self._cheapest, self._params
        cost, weights = booking.cost, policy.weights
        chain, chain_length = packed(booking).buffer_info()
        if among is not self._among:
            self._among, self._bits = among, _bytes_of(among)
        bits, num_bytes = self._bits.buffer_info()
        # Kept until the call is over.
        holders = _bytes_of(fleet.adapters.holders(cost.adapter)) if cost.adapter else None
        _QUESTION.pack_into(
            *(params, 0, chain, bits, chain_length, num_bytes),
            *(cost.prompt_tokens, cost.block_size, cost.output_tokens, cost.num_sequences),
            *(fleet.now, policy.crowding(fleet), weights.reuse, weights.reuse_half_life_s),
            *(fleet.silent_after_s, policy.lane_mean_s(fleet), hold_s, reserves),
            *(holders.buffer_info() if holders is not None else (0, 0)),
        )
        if fleet.core.place(fleet.core.handle, self._address):
            # Out of memory: Python asks for less of it at once.
            return super().place(booking, among, hold_s, reserves=reserves)
        slot, booking.num_cached_blocks, booking.predicted_cost_s, is_booked, wait_s, prefill_s, free_at = (
            _ANSWER.unpack_from(params, _QUESTION.size)
        )
        booking.slot, booking.predicted_wait_s, booking.prefill_s = slot, wait_s, prefill_s
        if is_booked:
            fleet.tell_moved(slot)
            policy.placed(prefill_s)
            return True
        if reserves:
            self._reserved.append((slot, free_at))
            fleet.tell_moved(slot)
        return False


def packed(booking: Booking) -> array[int]:
    """The hashes of a booking's chain as the core takes them."""
    if booking.packed_hashes is None:
        booking.packed_hashes = _keys(booking.cost.block_hashes)
    return booking.packed_hashes


def _bytes_of(bitmap: int) -> array[int]:
    """A bitmap as the core takes it; at least one byte."""
    return array("B", bitmap.to_bytes(bitmap.bit_length() // 8 + 1, "little"))


def _keys(hashes: Iterable[Hashable]) -> array[int]:
    return array("q", map(hash, hashes))


def _check(status: int) -> None:
    if status:
        raise MemoryError("the balancer's core")
