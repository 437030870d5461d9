"""Fields of the custom resources that infra/kubernetes has, for which no package carries a schema.

RayService: KubeRay's API reference, https://ray-project.github.io/kuberay/reference/api/ (ray.io/v1).
PodMonitor, PrometheusRule, ScrapeConfig: the Prometheus operator's,
https://prometheus-operator.dev/docs/api-reference/api/ (monitoring.coreos.com).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Type(NamedTuple):
    """A type of a field: `kinds` as Python reads them, `fields` of an object, `item` of an array, `one_of` values."""

    kinds: tuple[type, ...]
    fields: dict[str, Type] | None = None
    required: tuple[str, ...] = ()
    item: Type | None = None
    one_of: tuple[Any, ...] = ()


def _object(required: tuple[str, ...] = (), **fields: Type) -> Type:
    return Type((dict,), fields, required)


STRING, INTEGER, BOOLEAN = Type((str,)), Type((int,)), Type((bool,))
# Validated apart, by Kubernetes' own schemas.
KUBERNETES, KUBERNETES_LIST = Type((dict,)), Type((list,))
STRINGS = Type((dict,))  # name → string

_CREDENTIAL = _object(valueFrom=KUBERNETES, value=STRING)
_AUTOSCALER = _object(
    resources=KUBERNETES,
    image=STRING,
    imagePullPolicy=STRING,
    securityContext=KUBERNETES,
    idleTimeoutSeconds=INTEGER,
    upscalingMode=Type((str,), one_of=("Default", "Aggressive", "Conservative")),
    version=Type((str,), one_of=("v1", "v2")),
    env=KUBERNETES_LIST,
    envFrom=KUBERNETES_LIST,
    volumeMounts=KUBERNETES_LIST,
)
_HEAD = _object(
    ("template",),
    template=KUBERNETES,
    headService=KUBERNETES,
    enableIngress=BOOLEAN,
    rayStartParams=STRINGS,
    serviceType=STRING,
)
_WORKERS = _object(
    ("groupName", "template", "maxReplicas", "minReplicas"),
    suspend=BOOLEAN,
    groupName=STRING,
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    idleTimeoutSeconds=INTEGER,
    rayStartParams=STRINGS,
    template=KUBERNETES,
    scaleStrategy=KUBERNETES,
    numOfHosts=INTEGER,
)
_CLUSTER = _object(
    ("headGroupSpec",),
    suspend=BOOLEAN,
    managedBy=STRING,
    authOptions=_object(mode=Type((str,), one_of=("disabled", "token"))),
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=STRINGS,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=_object(
        ("redisAddress",),
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=STRING,
        redisAddress=STRING,
    ),
    headGroupSpec=_HEAD,
    rayVersion=STRING,
    workerGroupSpecs=Type((list,), item=_WORKERS),
)
_RAY_SERVICE = _object(
    ("rayClusterConfig",),
    serveService=KUBERNETES,
    upgradeStrategy=_object(type=Type((str,), one_of=("NewCluster", "None"))),
    serveConfigV2=STRING,
    rayClusterConfig=_CLUSTER,
    excludeHeadPodFromServeSvc=BOOLEAN,
)
_RELABELING = _object(
    sourceLabels=KUBERNETES_LIST,
    separator=STRING,
    targetLabel=STRING,
    regex=STRING,
    modulus=INTEGER,
    replacement=STRING,
    action=STRING,
)
_POD_MONITOR = _object(
    ("selector", "podMetricsEndpoints"),
    selector=KUBERNETES,
    namespaceSelector=KUBERNETES,
    jobLabel=STRING,
    podTargetLabels=KUBERNETES_LIST,
    podMetricsEndpoints=Type(
        (list,),
        item=_object(
            port=STRING,
            path=STRING,
            scheme=STRING,
            interval=STRING,
            scrapeTimeout=STRING,
            honorLabels=BOOLEAN,
            relabelings=Type((list,), item=_RELABELING),
            metricRelabelings=Type((list,), item=_RELABELING),
        ),
    ),
)

_PROMETHEUS_RULE = _object(
    ("groups",),
    groups=Type(
        (list,),
        item=_object(
            ("name", "rules"),
            name=STRING,
            interval=STRING,
            limit=INTEGER,
            labels=STRINGS,
            rules=Type(
                (list,),
                item=_object(
                    ("expr",),
                    record=STRING,
                    alert=STRING,
                    expr=STRING,
                    **{"for": STRING},
                    keep_firing_for=STRING,
                    labels=STRINGS,
                    annotations=STRINGS,
                ),
            ),
        ),
    ),
)
_SCRAPE_CONFIG = _object(
    staticConfigs=Type((list,), item=_object(("targets",), targets=Type((list,), item=STRING), labels=STRINGS)),
    jobName=STRING,
    metricsPath=STRING,
    scrapeInterval=STRING,
    scrapeTimeout=STRING,
    scheme=Type((str,), one_of=("HTTP", "HTTPS")),
    authorization=_object(type=STRING, credentials=_object(("key",), name=STRING, key=STRING, optional=BOOLEAN)),
    relabelings=Type((list,), item=_RELABELING),
    metricRelabelings=Type((list,), item=_RELABELING),
)

CUSTOM_RESOURCES = {
    ("ray.io/v1", "RayService"): _RAY_SERVICE,
    ("monitoring.coreos.com/v1", "PodMonitor"): _POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _PROMETHEUS_RULE,
    ("monitoring.coreos.com/v1alpha1", "ScrapeConfig"): _SCRAPE_CONFIG,
}


def problems(value: Any, expected: Type, where: str) -> list[str]:
    """What is wrong with a value, by the table."""
    kind = type(value)
    if not issubclass(kind, expected.kinds) or (kind is bool and bool not in expected.kinds):
        return [f"{where}: {value!r} is no {expected.kinds[0].__name__}"]
    if expected.one_of and value not in expected.one_of:
        return [f"{where}: {value!r} is none of {expected.one_of}"]
    found = []
    if expected is STRINGS:
        found += [f"{where}.{key}: {each!r} is no str" for key, each in value.items() if not isinstance(each, str)]
    if expected.fields is not None:
        found += [f"{where}: {key} is missing" for key in expected.required if key not in value]
        for key, each in value.items():
            if key in expected.fields:
                found += problems(each, expected.fields[key], f"{where}.{key}")
            else:
                found.append(f"{where}: {key} is no such field")
    if expected.item is not None:
        for index, each in enumerate(value):
            found += problems(each, expected.item, f"{where}[{index}]")
    return found
