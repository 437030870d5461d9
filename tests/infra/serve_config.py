"""What is wrong with a Serve config: by Serve's own schema, and by Quire's arguments."""

from __future__ import annotations

import warnings
from typing import Any

import yaml
from pydantic import ValidationError

from app.cli.config_file import BUILDERS
from app.config import INGRESS, IngressUserConfig, ModelArgs
from engine.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own, of pydantic's older ways
    from ray.serve.schema import ServeDeploySchema


def serve_problems(text: str) -> list[str]:
    """Models' sources are not opened: those of a cluster are not on this machine."""
    raw: dict[str, Any] = yaml.safe_load(text)
    try:
        config = ServeDeploySchema.model_validate(raw)
    except ValidationError as error:
        return [str(error)]
    found = []
    served: dict[str, list[str]] = {}
    for application in config.applications:
        builder = BUILDERS.get(application.import_path)
        if builder is None:
            found.append(f"{application.name}: import_path {application.import_path} is not Quire's")
            continue
        try:
            served[application.name] = [model.id for model in builder.from_dict(application.args).models]
        except ConfigError as error:
            found.append(f"{application.name}: {error}")
    for application in raw["applications"]:
        for deployment in application.get("deployments", []):
            if deployment["name"] != INGRESS:
                found.append(f"{application['name']}: no deployment {deployment['name']}")
                continue
            try:
                user_config = IngressUserConfig.from_dict(deployment["user_config"], "user_config")
            except ConfigError as error:
                found.append(f"{application['name']}: {error}")
                continue
            found += [
                f"{application['name']}: no application {entry.application!r} with a model {entry.id!r}"
                for entry in user_config.models
                if entry.id not in served.get(entry.application, [])
            ]
    return found


def models_of(text: str) -> list[ModelArgs]:
    """The models of a config that has no problems."""
    return [
        model
        for application in yaml.safe_load(text)["applications"]
        for model in BUILDERS[application["import_path"]].from_dict(application["args"]).models
    ]
