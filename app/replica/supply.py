"""Whether a cluster could ever hold a replica's placement group: now, or with nodes that an autoscaler adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from app.replica.placement import Bundle, describe_bundles
from engine.errors import ConfigError

# Ray labels nodes with the group that `ray up` or KubeRay made them for; of such, more may come.
_NODE_GROUP_LABEL = "ray.io/node-group"


class NodeGroup(NamedTuple):
    """Nodes alike. `number` is how many there are, or could be; None is any number."""

    resources: Mapping[str, float]
    number: int | None = 1


class Supply(NamedTuple):
    """What a cluster has, or could have.

    Attributes:
        groups: its nodes, and those of the autoscaler's node types where these are known.
        is_open: others may come of which nothing is known.
    """

    groups: list[NodeGroup]
    is_open: bool = False


def check_supply(model_id: str, bundles: list[Bundle], strategy: str, supply: Supply) -> None:
    """Raise ConfigError, which says what is missing, if the placement group could never be placed.

    One that has to wait, for nodes or for what is in use, is no error.
    """
    if supply.is_open or _fits(bundles, strategy, supply.groups):
        return
    together = strategy == "STRICT_PACK"
    wanted = {name: amount * (len(bundles) if together else 1) for name, amount in bundles[0].items()}
    missing = []
    for name, amount in wanted.items():
        most = max((group.resources.get(name, 0.0) for group in supply.groups), default=0.0)
        if most < amount:
            missing.append(f"{name} {amount:g} where a node has {most:g} at most")
    places = sum(_places(group.resources, bundles[0]) * (group.number or 0) for group in supply.groups)
    alone = "no node has all of it" if together else f"all nodes together hold {places} of them"
    why = "; ".join(missing) or alone
    raise ConfigError(
        f"model {model_id!r}: tensor_parallel_size={len(bundles)} needs {describe_bundles(bundles, strategy)}: "
        f"{why}, and no autoscaler could add one that has"
    )


def cluster_supply() -> Supply:
    """Of the cluster that this process is connected to."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    groups = [NodeGroup(node["Resources"]) for node in nodes]
    types = _autoscaler_types()
    is_managed = any(node.get("Labels", {}).get(_NODE_GROUP_LABEL) for node in nodes)
    return Supply(groups + types, is_open=is_managed and not types)


def _autoscaler_types() -> list[NodeGroup]:
    """What an autoscaler has told the cluster that it can add. Not all tell; those of Ray's own clusters do not."""
    import ray

    # Private to Ray, whose version is pinned.
    config: Any = ray._private.state.state.get_cluster_config()
    if config is None:
        return []
    return [
        NodeGroup(dict(group.resources), None if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
    ]


def _fits(bundles: list[Bundle], strategy: str, groups: list[NodeGroup]) -> bool:
    places = [(_places(group.resources, bundles[0]), group.number) for group in groups]
    if strategy == "STRICT_PACK":
        return any(each >= len(bundles) and count != 0 for each, count in places)
    if any(each > 0 and count is None for each, count in places):
        return True
    return sum(each * (count or 0) for each, count in places) >= len(bundles)


def _places(resources: Mapping[str, float], bundle: Bundle) -> int:
    """How many such bundles a node holds while it is empty."""
    # Ray counts in ten-thousandths; a tenth of a CPU thrice is three tenths to it.
    return min(int(resources.get(name, 0.0) / amount + 1e-4) for name, amount in bundle.items())
