"""KV cache memory: blocks, block tables, sharing and prefix caching. Plain Python and NumPy, no torch."""

from engine.memory.block_allocator import BlockAllocator
from engine.memory.block_hash import root_hash
from engine.memory.block_table import BlockTable
from engine.memory.kv_cache import KVCache
from engine.memory.kv_cache_manager import BlockCopy, KVCacheManager
from engine.memory.prefix_cache import PrefixCache

__all__ = ["BlockAllocator", "BlockCopy", "BlockTable", "KVCache", "KVCacheManager", "PrefixCache", "root_hash"]
