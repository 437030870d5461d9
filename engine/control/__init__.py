"""The control channel of tensor parallelism: rank 0 says what a step computes, and notices who is lost (§4.6)."""

from __future__ import annotations

from engine.control.connection import Invitation
from engine.control.driver import WorkerGroup, WorkerLauncher
from engine.control.processes import WorkerProcesses
from engine.control.rank import RankSetup, serve_rank

__all__ = ["Invitation", "RankSetup", "WorkerGroup", "WorkerLauncher", "WorkerProcesses", "serve_rank"]
