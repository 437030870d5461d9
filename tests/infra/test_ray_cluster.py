"""infra/aws/cluster.yaml: by Ray's own schema and checks, and by its AWS provider against moto."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import (
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

ROOT = Path(__file__).parents[2]
AWS = ROOT / "infra" / "aws"


def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((AWS / "cluster.yaml").read_text())
    return config


def cluster_problems(config: dict[str, Any]) -> list[str]:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError, RuntimeError, KeyError) as error:
        return [str(getattr(error, "message", error))]
    found = []
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"] and kind["min_workers"] > kind["max_workers"]:
            found.append(f"{name}: min_workers is above max_workers")
    if sum(kind["max_workers"] for kind in config["available_node_types"].values()) > config["max_workers"]:
        found.append("max_workers holds the groups back")
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    if not any("--autoscaling-config" in command for command in commands):
        found.append("the head does not scale")
    profiles = (AWS / "terraform" / "ray_up.tf").read_text()
    for name, kind in config["available_node_types"].items():
        role = kind["node_config"]["IamInstanceProfile"]["Name"].removeprefix("quire-ray-")
        if f'"{role}"' not in profiles:
            found.append(f"{name}: no instance profile for {role}")
    options = " ".join(config["docker"]["run_options"])
    if "RAY_AUTH_MODE=token" not in options:
        found.append("Ray's ports authenticate nobody")
    elif not any("RAY_AUTH_TOKEN=" in command for command in config["initialization_commands"]):
        found.append("Ray has no token")
    return found


def test_ray_takes_it() -> None:
    assert cluster_problems(cluster()) == []


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key": (lambda of: of.update(max_worker=3), "max_worker"),
    "a type": (lambda of: of.update(idle_timeout_minutes="ten"), "ten"),
    "a key of a node type": (lambda of: of["available_node_types"]["gpu-spot"].update(min_worker=1), "min_worker"),
    "a head that is not there": (lambda of: of.update(head_node_type="ray.head"), "head_node_type"),
    "fewer workers than the least": (lambda of: of.update(max_workers=0), "max_workers"),
    "a group held back": (lambda of: of.update(max_workers=5), "max_workers holds the groups back"),
    "no scaling": (lambda of: of.update(head_start_ray_commands=["ray start --head"]), "the head does not scale"),
    "a role": (
        lambda of: of["available_node_types"]["head"]["node_config"]["IamInstanceProfile"].update(Name="quire-ray-x"),
        "no instance profile for x",
    ),
    "no token anywhere": (lambda of: of.update(initialization_commands=[]), "Ray has no token"),
    "no token": (lambda of: of["docker"].update(run_options=[]), "authenticate nobody"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    edit, problem = MISTAKES[mistake]
    config = cluster()
    edit(config)
    found = cluster_problems(config)
    assert any(problem in each for each in found), found


def test_idle_nodes_go_as_soon_as_on_kubernetes() -> None:
    service = yaml.safe_load((ROOT / "infra" / "kubernetes" / "base" / "ray_service.yaml").read_text())
    seconds = service["spec"]["rayClusterConfig"]["autoscalerOptions"]["idleTimeoutSeconds"]
    assert seconds == 60 * cluster()["idle_timeout_minutes"]


def test_options_of_ray_start_are_ones_that_it_has() -> None:
    import ray.scripts.scripts as scripts

    known = {name for parameter in scripts.start.params for name in parameter.opts}
    config = cluster()
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        if "ray start" in command:
            used = re.findall(r"--[a-z-]+", " ".join(shlex.split(command)))
            assert used
            assert set(used) <= known


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with mock_aws():
        for role in ("head", "worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=f"quire-ray-{role}")
        yield boto3.client("ec2", region_name="us-west-2")


@pytest.mark.parametrize(("name", "market"), [("gpu-on-demand", None), ("gpu-spot", "spot"), ("head", None)])
def test_ray_starts_and_ends_each_kind_of_node(aws: Any, name: str, market: str | None) -> None:
    config = cluster()
    subnet = aws.describe_subnets()["Subnets"][0]["SubnetId"]
    image = aws.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    # What Ray's bootstrap adds to each node's config.
    node_config = config["available_node_types"][name]["node_config"] | {"SubnetIds": [subnet], "ImageId": image}
    make_provider: Any = AWSNodeProvider  # Ray's has no types
    provider: Any = make_provider(config["provider"], config["cluster_name"])
    tags = {
        TAG_RAY_NODE_KIND: "worker",
        TAG_RAY_NODE_NAME: "ray-quire-worker",
        TAG_RAY_NODE_STATUS: "uninitialized",
        TAG_RAY_USER_NODE_TYPE: name,
        TAG_RAY_LAUNCH_CONFIG: "test",
    }
    for _ in range(2):  # of a request for two at least one must come, and moto gives no more
        provider.create_node(node_config, tags, 1)
    nodes = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: name})
    assert len(nodes) == 2
    (reservation, *_) = aws.describe_instances(InstanceIds=nodes)["Reservations"]
    instance = reservation["Instances"][0]
    assert instance["InstanceType"] == config["available_node_types"][name]["node_config"]["InstanceType"]
    assert instance.get("InstanceLifecycle") == market
    assert {"Key": TAG_RAY_CLUSTER_NAME, "Value": "quire"} in instance["Tags"]
    provider.terminate_nodes(nodes)
    assert provider.non_terminated_nodes({}) == []
