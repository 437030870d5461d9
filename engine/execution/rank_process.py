"""`python -m engine.execution.rank_process`: one rank of a tensor-parallel engine, started by WorkerProcesses."""

from __future__ import annotations

import logging
import sys

from engine.build import load_worker
from engine.control import serve_rank
from engine.control.processes import read_invitation
from engine.errors import QuireError


def main() -> int:
    """The exit status."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        serve_rank(read_invitation(), load_worker)
    except QuireError:
        return 1  # rank 0 has been told, and says it to whoever started both
    return 0


if __name__ == "__main__":
    sys.exit(main())
