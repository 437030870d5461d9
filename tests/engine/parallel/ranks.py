"""Groups of ranks on this machine."""

from __future__ import annotations

import itertools
import os
import socket
from typing import Any

from engine.parallel import TensorParallelGroup

_numbers = itertools.count()


def make_groups(world_size: int, **options: Any) -> list[TensorParallelGroup]:
    """Each rank's place in one group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    segment = f"quire-test-{os.getpid()}-{next(_numbers)}"
    return [
        TensorParallelGroup(rank, world_size, world_size, address, segment, **options) for rank in range(world_size)
    ]
