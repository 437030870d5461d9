"""infra/kubernetes: what Kubernetes' schemas, KubeRay's reference and the manifests among themselves demand."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.infra.custom_resources import CUSTOM_RESOURCES, problems
from tests.infra.kustomize import KustomizeError, Manifest, render
from tests.infra.serve_config import models_of

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"
FOLDERS = [KUBERNETES / "base", *sorted((KUBERNETES / "overlays").iterdir())]
SECRETS = list(yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text()))
VERSION = "1.33"  # as in infra/aws/terraform/variables.tf
# Megabytes of JSON, which the package reads anew for each manifest.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def schema_problems(manifest: Manifest) -> list[str]:
    table = CUSTOM_RESOURCES.get((manifest["apiVersion"], manifest["kind"]))
    if table is not None:
        found = problems(manifest["spec"], table, manifest["kind"])
        for where, spec in pods(manifest):
            found += [f"{where}: {each}" for each in schema_problems({"apiVersion": "v1", "kind": "Pod"} | spec)]
        return found
    try:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{manifest['kind']}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"no schema of {manifest['apiVersion']} {manifest['kind']}"]
    return []


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Pod templates, as {metadata, spec}."""
    if manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    elif manifest["kind"] == "StatefulSet":
        yield manifest["metadata"]["name"], manifest["spec"]["template"]


def num_bytes(text: str) -> int:
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    return int(text.removesuffix(unit)) * _UNITS.get(unit, 1)


def security_problems(manifests: list[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        for where, pod in pods(manifest):
            context = pod["spec"].get("securityContext", {})
            if not context.get("runAsNonRoot") or not context.get("runAsUser"):
                yield f"{where}: may run as root"
            for container in pod["spec"]["containers"]:
                own = container.get("securityContext", {})
                if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
                    yield f"{where}: {container['name']} keeps privileges"
                if ":" not in container["image"] or container["image"].endswith(":latest"):
                    yield f"{where}: {container['image']} is not pinned"
                if "memory" not in container["resources"].get("limits", {}):
                    yield f"{where}: {container['name']} has no limit of memory"
                for variable in container.get("env", []):
                    if any(word in variable["name"] for word in ("PASSWORD", "KEYS", "TOKEN")) and "value" in variable:
                        yield f"{where}: {variable['name']} is written in the open"


def reference_problems(manifests: list[Manifest]) -> Iterator[str]:
    named = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    secrets = {each["metadata"]["name"]: set(each["stringData"]) for each in SECRETS}
    for reference in (*_find(manifests, "secretKeyRef"), *_find(manifests, "credentials")):
        if reference["key"] not in secrets.get(reference["name"], set()):
            yield f"no secret {reference['name']} with a key {reference['key']}"
    labels = []
    for manifest in manifests:
        for where, pod in pods(manifest):
            kind = {"ray.io/node-type": "head" if where == "head" else "worker"} if "ray" in str(pod) else {}
            labels.append(pod["metadata"]["labels"] | kind)
            account = pod["spec"].get("serviceAccountName")
            if account and ("ServiceAccount", account) not in named:
                yield f"{where}: no service account {account}"
            volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
            volumes |= {claim["metadata"]["name"] for claim in _claims(manifest)}
            for mount in _find(pod, "volumeMounts"):
                for each in mount:
                    if each["name"] not in volumes:
                        yield f"{where}: no volume {each['name']}"
            for claim in _find(pod, "persistentVolumeClaim"):
                if ("PersistentVolumeClaim", claim["claimName"]) not in named:
                    yield f"{where}: no claim {claim['claimName']}"
    for manifest in manifests:
        for selector in _find(manifest, "matchLabels"):
            of_pods = "kubernetes.io/metadata.name" not in selector
            if of_pods and not any(selector.items() <= each.items() for each in labels):
                yield f"{manifest['kind']} {manifest['metadata']['name']}: {selector} selects no pod"
        # KubeRay makes it, under the RayService's name.
        services = {f"{name}-serve-svc" for kind, name in named if kind == "RayService"}
        for backend in _find(manifest, "backend"):
            if backend["service"]["name"] not in services:
                yield f"no service {backend['service']['name']}"
        for target in _flat(_find(manifest, "targets")):
            if target not in {f"{service}.{manifest['metadata']['namespace']}.svc:8000" for service in services}:
                yield f"no service for {target}"
        for endpoint in (end for ends in _find(manifest, "podMetricsEndpoints") for end in ends):
            ports = [port["name"] for each in manifests for port in _flat(_find(each, "ports")) if "name" in port]
            if endpoint["port"] not in ports:
                yield f"no port {endpoint['port']}"


def cluster_problems(manifests: list[Manifest]) -> Iterator[str]:
    """What Ray, Serve and Kubernetes each say in their own place must fit."""
    (service,) = (each for each in manifests if each["kind"] == "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
        yield "replicas are not between minReplicas and maxReplicas"
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    have = worker["resources"]["requests"]
    cpus, gpus = float(have["cpu"]), float(have.get("nvidia.com/gpu", 0))
    for model in models_of(service["spec"]["serveConfigV2"]):
        ranks, options = model.engine_config.tensor_parallel_size, model.deployment.ray_actor_options
        if options.num_cpus * ranks > cpus or options.num_gpus * ranks > gpus:
            yield f"{model.id}: a replica does not fit into a worker"
        if options.num_gpus * ranks * model.deployment.num_replicas > gpus * group["maxReplicas"]:
            yield f"{model.id}: its replicas do not fit into maxReplicas workers"
    for key, seconds in _pairs(yaml.safe_load(service["spec"]["serveConfigV2"])):
        if key == "graceful_shutdown_timeout_s" and seconds >= pod["terminationGracePeriodSeconds"]:
            yield f"a pod is killed before graceful_shutdown_timeout_s={seconds}"
    mounts = {each["name"]: each["mountPath"] for each in worker["volumeMounts"]}
    kept = {mounts.get(each["name"]) for each in pod["volumes"] if "persistentVolumeClaim" in each}
    for usage in _find(yaml.safe_load(service["spec"]["serveConfigV2"]), "usage"):
        if usage["directory"] not in kept:
            yield f"usage is written to {usage['directory']}, which no claim keeps"
    bound = next(each["value"] for each in worker["env"] if each["name"] == "QUIRE_CACHE_BYTES")
    disk = next(each["emptyDir"]["sizeLimit"] for each in pod["volumes"] if each["name"] == "cache")
    if num_bytes(bound) >= num_bytes(disk):
        yield f"the cache may take {bound}, its volume {disk}"


def network_problems(manifests: list[Manifest]) -> Iterator[str]:
    policies = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    if not any(each["spec"]["podSelector"] == {} and "ingress" not in each["spec"] for each in policies):
        yield "no policy denies by default"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            inside = all("podSelector" in peer and "namespaceSelector" not in peer for peer in rule.get("from", [{}]))
            ports = {port["port"] for port in rule.get("ports", [])}
            if not inside and (not ports or ports & {8404, 9101, 6379, 10001}):
                yield f"{policy['metadata']['name']}: {sorted(ports) or 'all ports'} are open to other namespaces"


def all_problems(manifests: list[Manifest]) -> list[str]:
    found = [problem for manifest in manifests for problem in schema_problems(manifest)]
    if not found:  # the others rely on the shape
        for check in (security_problems, reference_problems, cluster_problems, network_problems):
            found += check(manifests)
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_as_it_is_applied(folder: Path) -> None:
    assert all_problems(render(folder)) == []


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret["metadata"]["name"])
def test_secrets(secret: Manifest) -> None:
    assert schema_problems(secret) == []
    assert set(secret["stringData"].values()) == {"replace-me"}, "no real secret"


def _worker(manifests: dict[str, Any]) -> Any:
    return manifests["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a field of the RayService": (
        lambda of: of["RayService"]["spec"].update(serveConfig=""),
        "RayService: serveConfig is no such field",
    ),
    "a field of the cluster": (
        lambda of: of["RayService"]["spec"]["rayClusterConfig"].update(enableInTreeAutoscaling="yes"),
        "enableInTreeAutoscaling: 'yes' is no bool",
    ),
    "a field of the autoscaler": (
        lambda of: of["RayService"]["spec"]["rayClusterConfig"]["autoscalerOptions"].update(version="v3"),
        "'v3' is none of",
    ),
    "a number where a string goes": (
        lambda of: _worker(of)["rayStartParams"].update({"num-gpus": 1}),
        "rayStartParams.num-gpus: 1 is no str",
    ),
    "a field of a worker's container": (
        lambda of: _worker(of)["template"]["spec"]["containers"][0].update(volumeMount=[]),
        "volumeMount",
    ),
    "a field of a policy": (lambda of: of["NetworkPolicy"]["spec"].update(podSelectors={}), "podSelectors"),
    "a field of the budget": (
        lambda of: of["PodDisruptionBudget"]["spec"].update(maxUnavailable=[1]),
        "PodDisruptionBudget",
    ),
    "a field of the monitor": (
        lambda of: of["PodMonitor"]["spec"]["podMetricsEndpoints"][0].update(intervall="1s"),
        "intervall is no such field",
    ),
    "a field of the ingress": (
        lambda of: of["Ingress"]["spec"]["rules"][0]["http"]["paths"][0].update(pathType=1),
        "Ingress",
    ),
    "a field of the alerts": (
        lambda of: of["PrometheusRule"]["spec"]["groups"][0]["rules"][0].update(severity="critical"),
        "severity is no such field",
    ),
    "a field of the scrapes": (
        lambda of: of["ScrapeConfig"]["spec"].update(interval="15s"),
        "interval is no such field",
    ),
    "a target that is not there": (
        lambda of: of["ScrapeConfig"]["spec"]["staticConfigs"][0].update(targets=["quire:8000"]),
        "no service for quire:8000",
    ),
    "a key for Prometheus that is not there": (
        lambda of: of["ScrapeConfig"]["spec"]["authorization"]["credentials"].update(name="quire-metric"),
        "no secret quire-metric with a key key",
    ),
    "a field of the dashboards' map": (lambda of: of["ConfigMap"].update(files={}), "ConfigMap"),
    "root": (lambda of: of["StatefulSet"]["spec"]["template"]["spec"].pop("securityContext"), "may run as root"),
    "privileges": (
        lambda of: _worker(of)["template"]["spec"]["containers"][0].pop("securityContext"),
        "ray-worker keeps privileges",
    ),
    "a moving tag": (
        lambda of: of["StatefulSet"]["spec"]["template"]["spec"]["containers"][0].update(image="redis:latest"),
        "redis:latest is not pinned",
    ),
    "a key in the open": (
        lambda of: _worker(of)["template"]["spec"]["containers"][0]["env"].append(
            {"name": "QUIRE_API_KEYS", "value": "k"}
        ),
        "QUIRE_API_KEYS is written in the open",
    ),
    "a secret that is not there": (
        lambda of: of["RayService"]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"].update(
            redisPassword={"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
        ),
        "no secret redis with a key password",
    ),
    "a selector of nothing": (
        lambda of: of["PodMonitor"]["spec"]["selector"].update(matchLabels={"app": "quire"}),
        "selects no pod",
    ),
    "a service that is not there": (lambda of: of["RayService"]["metadata"].update(name="other"), "no service quire-"),
    "a replica too large": (
        lambda of: _worker(of)["template"]["spec"]["containers"][0]["resources"]["requests"].update(cpu="1"),
        "a replica does not fit into a worker",
    ),
    "a short grace": (
        lambda of: _worker(of)["template"]["spec"].update(terminationGracePeriodSeconds=30),
        "a pod is killed before graceful_shutdown_timeout_s=",
    ),
    "a small volume": (
        lambda of: _worker(of)["template"]["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="10Gi"),
        "the cache may take 18G, its volume 10Gi",
    ),
    "a claim that is not there": (
        lambda of: of["PersistentVolumeClaim"]["metadata"].update(name="usage"),
        "replicas: no claim quire-usage",
    ),
    "a field of the claim": (
        lambda of: of["PersistentVolumeClaim"]["spec"].update(accessMode="ReadWriteMany"),
        "PersistentVolumeClaim",
    ),
    "usage that ends with its pod": (
        lambda of: _worker(of)["template"]["spec"]["containers"][0]["volumeMounts"][2].update(mountPath="/usage"),
        "usage is written to /var/lib/quire/usage, which no claim keeps",
    ),
    "HAProxy's statistics to all": (
        lambda of: of["NetworkPolicy/ray"]["spec"]["ingress"][1]["ports"].append({"protocol": "TCP", "port": 8404}),
        "are open to other namespaces",
    ),
    "everything to all": (
        lambda of: of["NetworkPolicy/ray"]["spec"]["ingress"].append({}),
        "all ports are open to other namespaces",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    edit, problem = MISTAKES[mistake]
    manifests = render(KUBERNETES / "base")
    named = {each["kind"]: each for each in manifests}
    named |= {f"{each['kind']}/{each['metadata']['name']}": each for each in manifests}
    edit(named)
    found = all_problems(manifests)
    assert any(problem in each for each in found), found


@pytest.mark.parametrize(
    ("file", "right", "wrong", "problem"),
    [
        ("kustomization.yaml", "../../base", "../../bases", "no resource"),
        ("kustomization.yaml", "name: quire, newName", "name: quire-app, newName", "no container has the image"),
        ("kustomization.yaml", "kind: RayService", "kind: RayCluster", "which is not"),
        ("kustomization.yaml", "patches:", "patchesJson6902:", "unknown keys"),
        ("ray_service.yaml", "workerGroupSpecs/0/maxReplicas", "workerGroupSpecs/1/maxReplicas", "nothing is at"),
        ("ray_service.yaml", "/spec/serveConfigV2", "/spec/serveConfig", "nothing is at"),
    ],
)
def test_a_mistake_in_an_overlay_is_caught(tmp_path: Path, file: str, right: str, wrong: str, problem: str) -> None:
    for each in ("kubernetes", "monitoring"):
        shutil.copytree(KUBERNETES.parent / each, tmp_path / each)
    path = tmp_path / "kubernetes" / "overlays" / "gpu" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong, 1))
    with pytest.raises(KustomizeError, match=problem):
        render(path.parent)


def test_gpu_nodes_are_those_that_terraform_makes() -> None:
    variables = (KUBERNETES.parent / "aws" / "terraform" / "variables.tf").read_text()
    for name in ("gpu", "gpu-tp"):
        (service,) = (each for each in render(KUBERNETES / "overlays" / name) if each["kind"] == "RayService")
        pod = copy.deepcopy(service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"])
        assert f'"{pod["nodeSelector"]["quire.io/pool"]}"' in variables
    assert f'"{VERSION}"' in variables


def _find(node: Any, key: str) -> Iterator[Any]:
    for name, value in _pairs(node):
        if name == key:
            yield value


def _pairs(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _pairs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pairs(value)


def _flat(lists: Iterator[Any]) -> Iterator[Any]:
    for each in lists:
        yield from each


def _claims(manifest: Manifest) -> list[Manifest]:
    claims: list[Manifest] = manifest["spec"].get("volumeClaimTemplates", [])
    return claims
