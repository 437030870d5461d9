"""A Ray cluster on this machine whose nodes Ray's own autoscaler adds and removes: cluster autoscaling, rehearsed.

The autoscaler is the one that `ray up` and KubeRay run (version 2). Only the provider differs: Ray's fake multi-node
provider, for which a node is another raylet of this machine, with the resources that it is said to have. Whether a
Serve config asks for what its nodes have, and what is left on nodes that should go, shows here without renting any.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engine.errors import ConfigError, QuireError

HEAD = "ray.head.default"

# The provider knows its head by this id and no other.
_HEAD_NODE_ID = "f" * 51 + "00000"
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
# In the environment of every process of a cluster, and of none else: by it they are found again.
_MARK = "QUIRE_LOCAL_CLUSTER"
_COMMANDS = (
    "initialization_commands",
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
_OBJECT_STORE_BYTES = 80 << 20
# How often the autoscaler looks; every five seconds on a cluster that costs something.
_UPDATE_INTERVAL_S = 1
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class NodeType:
    """Nodes that the autoscaler may add: `resources` of each as in a cluster config, and how many there may be."""

    resources: Mapping[str, float]
    max_workers: int
    min_workers: int = 0

    def __post_init__(self) -> None:
        if not self.resources or any(amount <= 0 for amount in self.resources.values()):
            raise ConfigError(f"resources={dict(self.resources)} must have amounts above 0")
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise ConfigError(f"min_workers={self.min_workers}, max_workers={self.max_workers} must be 0 <= min <= max")


@dataclass
class LocalCluster:
    """Starts on entering, and is gone with all its processes on leaving; other Ray clusters of this machine stay.

    Ray's `AutoscalingCluster` is of the same kind, but ends every Ray of the machine when it starts and stops, and
    needs a file that Ray's wheel does not have.

    Args:
        node_types: by name.
        head_resources: of the head, which is always there.
        idle_timeout_s: how long a node has nothing to do before it is removed.
        environment: further variables for Ray's processes; Serve's controller and replicas inherit them.

    Attributes:
        address: for `ray.init`.
        folder: Ray's logs and sockets; the autoscaler's own words are in `session_latest/logs/monitor.log`.
    """

    node_types: Mapping[str, NodeType]
    head_resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 4})
    idle_timeout_s: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str = field(default="", init=False)
    folder: Path = field(default=Path(), init=False)
    _mark: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if not self.node_types or HEAD in self.node_types:
            raise ConfigError(f"node_types={sorted(self.node_types)}: one or more, and none is called {HEAD!r}")
        if self.idle_timeout_s <= 0:
            raise ConfigError(f"idle_timeout_s={self.idle_timeout_s:g} must be above 0")

    def __enter__(self) -> Self:
        # Raises QuireError: Ray did not start; the message has its last words.
        self._mark = uuid.uuid4().hex
        # Ray's sockets lie below it, and their paths may have 107 letters.
        self.folder = Path(tempfile.mkdtemp(prefix="quire-ray-"))
        # Nobody else's ports: they are free now, and this machine's other clusters take the usual ones.
        port, client_port, metrics_port = _free_ports(3)
        self.address = f"127.0.0.1:{port}"
        config = self.folder / "cluster.json"
        config.write_text(
            json.dumps(cluster_config(self.node_types, self.head_resources, self.idle_timeout_s, self.address))
        )
        command = [
            *(sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head"),
            *(f"--port={port}", f"--temp-dir={self.folder}"),
            *(f"--autoscaling-config={config}", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
            *(f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0", "--node-manager-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false", "--disable-usage-stats"),
            *_resource_options(self.head_resources),
        ]
        output = self.folder / "start.log"
        try:
            with output.open("w") as file:
                done = subprocess.run(
                    command,
                    env=self._environment(metrics_port),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    timeout=_START_TIMEOUT_S,
                )
            if done.returncode:
                raise QuireError(f"Ray did not start: {output.read_text()[-1000:]}")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes of the cluster and remove its folder; idempotent. Drivers should have left it before."""
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        # Nothing of it is to be kept. Processes that start meanwhile are found in the next round.
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self._mark:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._mark = ""

    def processes(self) -> list[int]:
        """Ids of the cluster's processes on all its nodes; a driver that has joined it is none of them."""
        if not self._mark:
            return []
        wanted, found = f"{_MARK}={self._mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            # It may end while it is looked at, or be another user's.
            with contextlib.suppress(OSError):
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def _environment(self, metrics_port: int) -> dict[str, str]:
        # `ray start` asks for tokens as soon as this user has one, where `ray.init` does not.
        return {
            "RAY_AUTH_MODE": "disabled",
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            **self.environment,
            _MARK: self._mark,
            "AUTOSCALER_UPDATE_INTERVAL_S": str(_UPDATE_INTERVAL_S),
            "AUTOSCALER_METRIC_PORT": str(metrics_port),
            "RAY_FAKE_CLUSTER": "1",
            # Version 2 knows the head by these.
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_NODE_ID,
            # Labels the nodes as an autoscaler's, the provider's too; it knows their types by itself.
            "RAY_NODE_TYPE_NAME": HEAD,
        }


def cluster_config(
    node_types: Mapping[str, NodeType], head_resources: Mapping[str, float], idle_timeout_s: float, address: str
) -> dict[str, Any]:
    """What Ray's autoscaler is told, as `ray up` takes it. `address` is the head's, `host:port`."""
    types: dict[str, Any] = {HEAD: {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}}
    for name, kind in node_types.items():
        types[name] = {
            "resources": {"object_store_memory": _OBJECT_STORE_BYTES, **kind.resources},
            "node_config": {},
            "min_workers": kind.min_workers,
            "max_workers": kind.max_workers,
        }
    return {
        "cluster_name": "local",
        "max_workers": sum(kind.max_workers for kind in node_types.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_timeout_s / 60,
        "provider": {
            # By its module: under its own name Ray looks for a file of defaults that the wheel does not have.
            "type": "external",
            "module": _PROVIDER,
            "gcs_address": address,
            "head_node_id": _HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD,
        "available_node_types": types,
        # Nothing is set up on these nodes, but Ray reads the keys.
        **{name: [] for name in _COMMANDS},
        "auth": {},
        "docker": {},
        "file_mounts": {},
    }


def _resource_options(resources: Mapping[str, float]) -> Sequence[str]:
    rest = dict(resources)
    options = [f"--num-cpus={rest.pop('CPU', 0):g}", f"--num-gpus={rest.pop('GPU', 0):g}"]
    return [*options, f"--resources={json.dumps(rest)}"] if rest else options


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
