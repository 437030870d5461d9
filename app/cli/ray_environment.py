"""The environment that Ray is started in: what Ray and Serve read once, when their processes start.

A config cannot say any of it. `python -m app serve` sets it for the Ray that it starts; for a cluster of its own,
`python -m app environment CONFIG` prints it, to be exported before `ray start` on every node.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping

from app.cli.config_file import LoadedConfig
from app.ingress.proxy_check import VARIABLE as HAPROXY_VARIABLE

# Ray's own work beside the requests: as it comes, a seventh of a core on each node, of which there may be two.
_ALWAYS: Mapping[str, str] = {
    # Nothing is reported to anyone.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve's control loop compares what is with what should be; ten times a second is for clusters of thousands.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Per token these cost as much as all of Quire's own code: a hop between two threads of a process, and a Ray task's
    # result where a gRPC message does.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Serve kills a proxy that is not ready after five seconds, and then a start fails: on a busy node it is only slow.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # A dead proxy, through which all HTTP goes, is replaced after the third look that finds it so: not half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Ray's own metrics are gathered from all processes; ten times a second for those of requests, by default.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
    "RAY_metrics_report_interval_ms": "30000",
    # Ray's log monitor looks for new files twice a second rather than ten times.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    # Nor are the events of its processes' loops timed, one by one, and what the node does is looked at twice a minute.
    "RAY_event_stats": "0",
    "RAY_emit_main_service_metrics": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
    # A node's agent reads the files of Ray's events, of which a dashboard shows few, every two seconds.
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "10",
    # A raylet looks four times a second whether memory is short, five times for idle workers to end, ten times what
    # resources are free and whether rubbish is to be collected. Quire's memory is taken as a replica starts; its
    # workers are actors, which stay.
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    # Ray runs workers, and so the engine, behind all else on a node (15), its own services among that.
    "RAY_worker_niceness": "0",
    # No record of each of Ray's own calls, which nobody looks at without the dashboard.
    "RAY_task_events_report_interval_ms": "0",
}
# Each control loop costs 6 ms of a core. A replica that starts goes through its states one loop at a time, which is
# quick enough for a cluster; with autoscaling a request may be waiting for it.
_HAPROXY: Mapping[str, str] = {HAPROXY_VARIABLE: "1", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1"}
_AUTOSCALING: Mapping[str, str] = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1"}


def session_environment() -> dict[str, str]:
    """What holds for a session on this machine alone, which nothing stands before."""
    return {
        # Behind HAProxy an ingress replica that stops stays up for so long, for load balancers to hear of it: Serve's
        # half a minute is for those outside the cluster, and longer than a session's end waits. HAProxy reloads within
        # a second.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        # HAProxy has four threads on any machine. Each wakes for the streams of its own connections, where one would
        # take those of a whole step at a time; a core carries many thousand of their tokens a second.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
    }


def environment(config: LoadedConfig) -> dict[str, str]:
    """Variables and values for a config."""
    haproxy = _HAPROXY if config.haproxy else {}
    return {**_ALWAYS, **haproxy, **(_AUTOSCALING if config.autoscales else {})}


def apply_environment(config: LoadedConfig) -> None:
    """Set what is not set yet, in this process, before Ray is imported: its processes inherit it.

    For a session on this machine.
    """
    for name, value in {**environment(config), **session_environment()}.items():
        os.environ.setdefault(name, value)


def export_lines(config: LoadedConfig) -> Iterator[str]:
    """The same as lines for a shell."""
    for name, value in environment(config).items():
        yield f"export {name}={shlex.quote(value)}"
