"""Load: so many streams at a time (a closed loop), or requests when they are due, however busy the server is (open)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import SplitResult

from benchmarks.serving.client import Connection, StreamRecord


class Load(NamedTuple):
    """What to send. `due_s` has each request's second from the start, or is empty for a closed loop."""

    payloads: Sequence[bytes]
    concurrency: int
    due_s: Sequence[float] = ()


class ConnectionPool:
    """Connections that are kept for the next request, as a client library keeps them."""

    def __init__(self, url: SplitResult) -> None:
        self._host, self._port = url.hostname or "127.0.0.1", url.port or 80
        self._idle: list[Connection] = []

    async def exchange(self, payload: bytes, record: StreamRecord) -> None:
        """One request over an idle connection, or over a new one."""
        while self._idle and self._idle[-1].closed:
            self._idle.pop()
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            await connection.exchange(payload, record)
        finally:
            if record.error is None:
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Hang up everywhere."""
        for connection in self._idle:
            connection.close()

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return connection


async def run_load(url: SplitResult, load: Load) -> list[StreamRecord]:
    """Send all of it and wait for all answers; one record a request, in the order of the payloads."""
    pool = ConnectionPool(url)
    records: list[StreamRecord] = []
    try:
        if load.due_s:
            await _open_loop(pool, load, records)
        else:
            pending = iter(load.payloads)
            await asyncio.gather(*(_stream(pool, pending, records) for _ in range(load.concurrency)))
    finally:
        pool.close()
    return records


async def _stream(pool: ConnectionPool, pending: Iterator[bytes], records: list[StreamRecord]) -> None:
    for payload in pending:
        record = StreamRecord(time.perf_counter())
        records.append(record)
        await pool.exchange(payload, record)


async def _open_loop(pool: ConnectionPool, load: Load, records: list[StreamRecord]) -> None:
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for payload, due_s in zip(load.payloads, load.due_s, strict=True):
            record = StreamRecord(began_s + due_s)
            records.append(record)
            await asyncio.sleep(max(0.0, record.due_s - time.perf_counter()))
            group.create_task(pool.exchange(payload, record))
