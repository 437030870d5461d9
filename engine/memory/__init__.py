"""KV cache memory: blocks, block tables, sharing and prefix caching. Plain Python and NumPy, no torch."""

from engine.memory.accounting import MemoryUsage, measure_memory
from engine.memory.block_allocator import BlockAllocator
from engine.memory.block_copy import BlockCopy
from engine.memory.block_events import BlockChanges, BlockEvents
from engine.memory.block_hash import HASH_BYTES, hash_blocks, root_hash
from engine.memory.block_table import BlockTable
from engine.memory.buddy_allocator import BuddyAllocator, run_size
from engine.memory.kv_cache import KVCache, make_kv_cache
from engine.memory.kv_cache_manager import KVCacheManager
from engine.memory.prefix_cache import PrefixCache
from engine.memory.reservation import ReservationPolicy
from engine.memory.reserving_manager import ReservingManager

__all__ = [
    "HASH_BYTES",
    "BlockAllocator",
    "BlockChanges",
    "BlockCopy",
    "BlockEvents",
    "BlockTable",
    "BuddyAllocator",
    "KVCache",
    "KVCacheManager",
    "MemoryUsage",
    "PrefixCache",
    "ReservationPolicy",
    "ReservingManager",
    "hash_blocks",
    "make_kv_cache",
    "measure_memory",
    "root_hash",
    "run_size",
]
