"""What a Serve config's `args` may say: which models, how each is deployed, and how HTTP is served.

All are frozen and checked where they are made; unknown keys are errors that list the known ones.
"""

from app.config.application import AppArgs, IngressAppArgs, ModelAppArgs
from app.config.args import Args, describe, unknown_key
from app.config.deployment import DeploymentArgs, RayActorOptions, ScalingArgs
from app.config.ingress import IngressArgs, IngressUserConfig, Proxy
from app.config.model import ModelArgs, RemoteModel
from app.config.names import ANCHOR, INGRESS, REQUEST_ROUTER, deployment_names, engine_deployment_name
from app.config.routing import AdmissionArgs, BalancerArgs, ClassArgs
from app.config.usage import UsageArgs

__all__ = [
    "ANCHOR",
    "INGRESS",
    "REQUEST_ROUTER",
    "AdmissionArgs",
    "AppArgs",
    "Args",
    "BalancerArgs",
    "ClassArgs",
    "DeploymentArgs",
    "IngressAppArgs",
    "IngressArgs",
    "IngressUserConfig",
    "ModelAppArgs",
    "ModelArgs",
    "Proxy",
    "RayActorOptions",
    "RemoteModel",
    "ScalingArgs",
    "UsageArgs",
    "deployment_names",
    "describe",
    "engine_deployment_name",
    "unknown_key",
]
