"""Where the ranks of a tensor-parallel replica go: a placement group with a bundle for each, the driver in bundle 0."""

from __future__ import annotations

from typing import Any

from app.config import ModelArgs, RayActorOptions

Bundle = dict[str, float]


def placement_options(model: ModelArgs) -> dict[str, Any]:
    """What Serve is to be told; nothing for a model of one rank."""
    if model.engine_config.tensor_parallel_size == 1:
        return {}
    return {
        "placement_group_bundles": rank_bundles(model),
        "placement_group_strategy": model.deployment.placement_group_strategy or "STRICT_PACK",
    }


def rank_bundles(model: ModelArgs) -> list[Bundle]:
    """A bundle a rank, all alike: `ray_actor_options` are what each rank takes."""
    return [_bundle(model.deployment.ray_actor_options) for _ in range(model.engine_config.tensor_parallel_size)]


def _bundle(options: RayActorOptions) -> Bundle:
    wanted: Bundle = {"CPU": options.num_cpus, "GPU": options.num_gpus, **(options.resources or {})}
    if options.memory is not None:
        wanted["memory"] = float(options.memory)
    if options.accelerator_type is not None:
        # How Ray spells "on a node with such devices".
        wanted[f"accelerator_type:{options.accelerator_type}"] = 0.001
    return {name: amount for name, amount in wanted.items() if amount}


def describe_bundles(bundles: list[Bundle], strategy: str) -> str:
    """For people: `4 × {GPU: 1, CPU: 2} on one node`."""
    each = ", ".join(f"{name}: {amount:g}" for name, amount in bundles[0].items())
    return f"{len(bundles)} x {{{each}}}" + (" on one node" if strategy == "STRICT_PACK" else "")
