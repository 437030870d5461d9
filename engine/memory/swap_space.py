"""Swapping (§4.5): sequences whose blocks are on the host, and the copies that take a group out and bring it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from engine.config import CacheConfig
from engine.memory.block_copy import BlockCopy
from engine.memory.block_table import BlockTable
from engine.memory.device_block_pool import DeviceBlockPool
from engine.memory.host_block_pool import HostBlockPool
from engine.sequence import Sequence


class SwapSpace:
    """Moves tables between the device and a bounded host pool. A group goes out and comes in whole, its sharing kept.

    A swapped-out sequence's table names blocks of the host pool, which are counted as the device's are; its pinned
    blocks, which never leave the device, it goes on naming as `~block`.

    Args:
        device: the pool that blocks leave and come back to.
        tables: the block tables on the device, by seq_id, which the KV cache manager owns: swapping takes them out of
            here and puts them back.
    """

    def __init__(self, config: CacheConfig, device: DeviceBlockPool, tables: dict[int, BlockTable]) -> None:
        self._config = config
        self._device = device
        self._tables = tables
        self._host = HostBlockPool(config.num_swap_blocks)
        self._swapped: dict[int, BlockTable] = {}

    @property
    def num_free(self) -> int:
        """Free blocks of the host pool."""
        return self._host.num_free

    def holds(self, seq: Sequence) -> bool:
        return seq.seq_id in self._swapped

    def blocks_of(self, seqs: Iterable[Sequence]) -> list[int]:
        """Distinct device blocks with computed tokens that swapping these sequences out would copy."""
        blocks: dict[int, None] = {}
        for seq in seqs:
            if seq.seq_id in self._tables:
                num_computed = self._config.blocks_for(seq.num_computed_tokens)
                blocks.update(dict.fromkeys(self._tables[seq.seq_id].blocks[:num_computed].tolist()))
        return [block for block in blocks if block not in self._device.pinned]

    def swap_out(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Move a group's computed blocks to the host, each once. The caller has checked that they fit.

        Returns:
            Copies (device block, host block).
        """
        host_of = {block: self._host.allocate() for block in self.blocks_of(seqs)}
        for seq in seqs:
            table = self._tables.pop(seq.seq_id, None)
            if table is None:
                continue  # not yet forked: its trunk's blocks are all it has
            num_computed = self._config.blocks_for(seq.num_computed_tokens)
            swapped = BlockTable()
            for block in reversed(table.blocks.tolist()[num_computed:]):
                self._device.release(block)
            for block in table.blocks.tolist()[:num_computed]:
                if block in self._device.pinned:
                    swapped.append(~block)
                else:
                    self._host.share(host_of[block])
                    swapped.append(host_of[block])
            self._swapped[seq.seq_id] = swapped
            for block in reversed(table.blocks.tolist()[:num_computed]):
                if block not in self._device.pinned:
                    self._device.release(block)
        return [BlockCopy(device, host) for device, host in host_of.items()]

    def num_blocks_to_swap_in(self, seqs: Iterable[Sequence]) -> int:
        """Free device blocks that `swap_in` takes: hits that lie free count, those that are held do not."""
        hosts = {host: index for seq in seqs for index, host in self._host_blocks(seq)}
        cached = self._cached_on_device(seqs)
        return sum(host not in cached or self._device.is_free(cached[host]) for host in hosts)

    def swap_in(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Bring a group back: full blocks that are still cached are shared again, the rest is copied, each once.

        Returns:
            Copies (host block, device block).
        """
        device_of = self._cached_on_device(seqs)
        for block in device_of.values():
            self._device.share(block)
        copies = []
        for seq in seqs:
            for _, host in self._host_blocks(seq):
                if host not in device_of:
                    device_of[host] = self._device.allocate()
                    copies.append(BlockCopy(host, device_of[host]))
        # One reference was taken for each block above; each table now takes its own, and those are dropped.
        for seq in seqs:
            swapped = self._swapped.pop(seq.seq_id, None)
            if swapped is None:
                continue
            table = BlockTable()
            for entry in swapped.blocks.tolist():
                if entry < 0:
                    table.append(~entry)  # pinned, and named all along
                else:
                    self._device.share(device_of[entry])
                    table.append(device_of[entry])
            self._tables[seq.seq_id] = table
            self._host.release(entry for entry in swapped.blocks.tolist() if entry >= 0)
        for block in device_of.values():
            self._device.release(block)
        return copies

    def hand_over(self, seq: Sequence, heir: Sequence) -> None:
        self._swapped[heir.seq_id] = self._swapped.pop(seq.seq_id)

    def free(self, seq: Sequence) -> None:
        """Drop a swapped-out sequence's references; a no-op if it holds none here."""
        swapped = self._swapped.pop(seq.seq_id, None)
        if swapped is None:
            return
        entries = swapped.blocks.tolist()
        self._host.release(entry for entry in entries if entry >= 0)
        for entry in entries:
            if entry < 0:
                self._device.release(~entry)

    def _host_blocks(self, seq: Sequence) -> list[tuple[int, int]]:
        """(index in the table, host block) of a swapped-out sequence."""
        swapped = self._swapped.get(seq.seq_id)
        if swapped is None:
            return []
        return [(index, entry) for index, entry in enumerate(swapped.blocks.tolist()) if entry >= 0]

    def _cached_on_device(self, seqs: Iterable[Sequence]) -> dict[int, int]:
        """Host block → device block with the same content, where the prefix cache still knows one."""
        cached: dict[int, int] = {}
        for seq in seqs:
            for index, host in self._host_blocks(seq):
                if index < len(seq.block_hashes) and host not in cached:
                    block = self._device.find(seq.block_hashes[index])
                    if block is not None:
                        cached[host] = block
        return cached

    def pinned_names(self) -> Counter[int]:
        """How many swapped-out tables name each device block. For `check_invariants()`."""
        return Counter(~entry for table in self._swapped.values() for entry in table.blocks.tolist() if entry < 0)

    def check_invariants(self) -> None:
        """Raise AssertionError unless every host block is accounted for. O(blocks)."""
        assert self._tables.keys().isdisjoint(self._swapped)
        self._host.check_invariants(
            Counter(entry for table in self._swapped.values() for entry in table.blocks.tolist() if entry >= 0)
        )
