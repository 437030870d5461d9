"""Ranks as processes, without Ray: this process is rank 0, the others are told each step through a pipe."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from engine import EngineConfig, LLMEngine
from engine.config import CacheConfig
from engine.execution.worker import Worker, create_worker
from engine.loading import open_checkpoint
from engine.model_config import ModelConfig
from engine.parallel import TensorParallelGroup
from engine.preemption import SwapCost
from engine.scheduling import SamplerOutput, SchedulerOutput

_numbers = itertools.count()


def make_groups(world_size: int, **options: Any) -> list[TensorParallelGroup]:
    """The ranks of one group on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    segment = f"quire-test-{os.getpid()}-{next(_numbers)}"
    return [
        TensorParallelGroup(rank, world_size, world_size, address, segment, **options) for rank in range(world_size)
    ]


def make_worker(source: str, config: EngineConfig, group: TensorParallelGroup) -> Worker:
    checkpoint = open_checkpoint(source)
    return create_worker(checkpoint, worker_model_config(source, config), config, parallel=group)


def worker_model_config(source: str, config: EngineConfig) -> ModelConfig:
    """As build_engine: no rotary table for positions that no sequence reaches."""
    model = open_checkpoint(source).model_config()
    if config.max_model_len is None or model.position_embedding != "rotary":
        return model
    return dataclasses.replace(model, max_position_embeddings=config.max_model_len)


def serve(connection: Connection, gpu: int | None) -> None:
    """A rank's process: calls in, answers out, until the pipe closes."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # read when CUDA is first asked for anything
    worker: Worker | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            if name == "make":
                worker = None  # the old one first
                worker = make_worker(*arguments)
                answer = worker.choose_num_blocks(worker._model_config.max_position_embeddings)
            else:
                answer = getattr(worker, name)(*arguments)
            connection.send((True, answer))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))


class RankProcess:
    """One other rank. `call` returns at once; `answer` waits.

    Args:
        gpu: the only one that it sees; None is as this process.
    """

    def __init__(self, gpu: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, gpu), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, name: str, *arguments: object) -> None:
        self._connection.send((name, arguments))

    def answer(self) -> Any:
        assert self._connection.poll(120), "no answer from a rank"
        succeeded, value = self._connection.recv()
        assert succeeded, value
        return value

    def close(self) -> None:
        self._connection.close()
        self.process.join(20)
        assert self.process.exitcode == 0


class RankProcesses:
    """Processes that take part in one engine after another.

    Args:
        on_gpus: each rank has one to itself.
    """

    def __init__(self, on_gpus: bool = False) -> None:
        self.others: list[RankProcess] = []
        self._on_gpus = on_gpus

    def engine(self, source: str, config: EngineConfig) -> LLMEngine:
        world_size = config.tensor_parallel_size
        while len(self.others) < world_size - 1:
            self.others.append(RankProcess(len(self.others) + 1 if self._on_gpus else None))
        executor = RanksExecutor(self.others[: world_size - 1], source, config)
        model = open_checkpoint(source).model_config()
        cache = CacheConfig.of(config, executor.num_blocks)
        engine = LLMEngine(executor, model, config, cache)
        executor.build_cache(cache, engine.max_model_len)
        return engine

    def close(self) -> None:
        for other in self.others:
            other.close()


class RanksExecutor:
    """All ranks carry out the same SchedulerOutput; rank 0's tokens count."""

    def __init__(self, others: Sequence[RankProcess], source: str, config: EngineConfig) -> None:
        self.others = others
        groups = make_groups(len(others) + 1)
        for other, group in zip(others, groups[1:], strict=True):
            other.call("make", source, config, group)
        self.worker = make_worker(source, config, groups[0])
        own = self.worker.choose_num_blocks(self.worker._model_config.max_position_embeddings)
        self.num_blocks = min(own, *(other.answer() for other in others))

    def build_cache(self, cache: CacheConfig, max_model_len: int) -> None:
        self._on_all("build_cache", cache, max_model_len)

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        drawn: SamplerOutput = self._on_all("execute", output)
        return drawn

    def swap_cost(self) -> SwapCost | None:
        return self.worker.swap_cost

    def _on_all(self, name: str, *arguments: object) -> Any:
        for other in self.others:
            other.call(name, *arguments)
        method: Callable[..., Any] = getattr(self.worker, name)
        result = method(*arguments)
        answers = [other.answer() for other in self.others]
        assert all(answer in (None, SamplerOutput()) for answer in answers), "another rank has drawn tokens"
        return result
