"""A Serve config file, checked before anything starts: what is wrong is said in one line."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cli.yaml_file import read_yaml
from app.config import (
    ANCHOR,
    INGRESS,
    AppArgs,
    IngressAppArgs,
    IngressArgs,
    IngressUserConfig,
    ModelAppArgs,
    ModelArgs,
    deployment_names,
    describe,
    unknown_key,
)
from engine.errors import ConfigError, ModelLoadError
from engine.loading import open_checkpoint
from engine.parallel import split_decoder

AnyAppArgs = AppArgs | ModelAppArgs | IngressAppArgs
# What an application's `import_path` may say, and what its `args` are then.
BUILDERS: dict[str, type[AppArgs] | type[ModelAppArgs] | type[IngressAppArgs]] = {
    "app.builder:build": AppArgs,
    "app.builder:build_model": ModelAppArgs,
    "app.builder:build_ingress": IngressAppArgs,
}

# HAProxy's own ports: metrics, and statistics. They listen on all interfaces.
HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
# What Serve's own parts of the file may say; it passes over what it does not know.
SERVE_KEYS = {
    "config": {
        *("proxy_location", "http_options", "grpc_options", "controller_options", "logging_config", "tracing_config"),
        *("applications", "target_capacity"),
    },
    "http_options": {
        *("host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s"),
        *("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs"),
    },
    "applications": {
        *("name", "route_prefix", "import_path", "runtime_env", "host", "port", "deployments", "autoscaling_policy"),
        *("args", "logging_config", "external_scaler_enabled"),
    },
}


class _HttpOptions(BaseModel):
    """The part of Serve's options that is looked at here, with Serve's own defaults for YAML."""

    model_config = ConfigDict(extra="allow")

    host: str = "0.0.0.0"
    port: int = Field(default=8000, ge=1, le=65535)


class _Deployment(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    user_config: dict[str, Any] | None = None


class _Application(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = "default"
    route_prefix: str | None = "/"
    import_path: str
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: list[_Deployment] = Field(default_factory=list)


class _ServeConfig(BaseModel):
    model_config = ConfigDict(extra="allow")

    http_options: _HttpOptions = _HttpOptions()
    applications: list[_Application] = Field(min_length=1)


@dataclass(frozen=True)
class LoadedConfig:
    """A config file that is sound as far as can be told before Ray runs.

    Attributes:
        raw: the file's content, for Serve's own schema.
        apps: Quire's applications by name.
        user_configs: of the ingresses whose `user_config` the file sets, by application.
        route_prefixes: where HTTP reaches each; one without a prefix is left out.
        url: where clients will find the server.
    """

    path: Path
    raw: dict[str, Any]
    apps: dict[str, AnyAppArgs]
    user_configs: dict[str, IngressUserConfig]
    route_prefixes: list[str]
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def model_ids(self) -> list[str]:
        return [model.id for model in self.models]

    @property
    def models(self) -> list[ModelArgs]:
        """Of all applications."""
        return [model for args in self.apps.values() for model in args.models]

    @property
    def ingresses(self) -> list[IngressArgs]:
        """Settings of the HTTP deployments."""
        return [args.ingress for args in self.apps.values() if not isinstance(args, ModelAppArgs)]

    @property
    def haproxy(self) -> bool:
        """Whether HAProxy is to stand before the ingresses; one proxy serves them all."""
        return any(ingress.proxy == "haproxy" for ingress in self.ingresses)

    @property
    def autoscales(self) -> bool:
        """Whether any model's replicas follow its load."""
        return any(model.deployment.autoscaling for model in self.models)

    @property
    def num_cpus(self) -> float:
        """Logical CPUs that all replicas ask for together."""
        ingresses = sum(part.num_replicas * part.ray_actor_options.num_cpus for part in self.ingresses)
        return ingresses + sum(
            model.engine_config.tensor_parallel_size
            * model.deployment.most_replicas
            * model.deployment.ray_actor_options.num_cpus
            for model in self.models
        )


def load_config(path: Path) -> LoadedConfig:
    """Read and check a config: its YAML, its keys, its models' sources.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or has an unknown or wrong key.
        ModelLoadError: a model's source does not exist.
    """
    raw = read_yaml(path)
    try:
        config = _ServeConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, 'config')}") from None
    _check_serve_keys(path, config)
    apps: dict[str, AnyAppArgs] = {}
    user_configs = {}
    for application in config.applications:
        builder = BUILDERS.get(application.import_path)
        if builder is None:
            what = f"import_path {application.import_path!r} of {application.name!r}"
            raise ConfigError(f"{path}: {what} is not Quire's; known: {', '.join(BUILDERS)}")
        try:
            apps[application.name] = builder.from_dict(application.args)
            user_config = _user_config(application)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if user_config is not None:
            user_configs[application.name] = user_config
    loaded_models = [model for args in apps.values() for model in args.models]
    for model in loaded_models:
        _check_source(model)
    _check_deployments(path, config, apps)
    _check_names(path, apps, user_configs)
    for name, user_config in user_configs.items():
        _check_nothing_dropped(path, name, apps[name], user_config)
    prefixes = [application.route_prefix for application in config.applications if application.route_prefix]
    return LoadedConfig(path, raw, apps, user_configs, prefixes, config.http_options.host, config.http_options.port)


def _check_serve_keys(path: Path, config: _ServeConfig) -> None:
    parts: list[tuple[str, str, BaseModel]] = [("config", "config", config)]
    parts.append(("config.http_options", "http_options", config.http_options))
    for index, application in enumerate(config.applications):
        parts.append((f"config.applications[{index}]", "applications", application))
    for where, part, given in parts:
        for key in given.model_extra or {}:
            if key not in SERVE_KEYS[part]:
                raise ConfigError(f"{path}: {where}.{key}: {unknown_key(key, SERVE_KEYS[part])}")


def _check_deployments(path: Path, config: _ServeConfig, apps: dict[str, AnyAppArgs]) -> None:
    """Each application has a name and a prefix of its own, and what `deployments` overrides is there."""
    for what in ("name", "route_prefix"):
        given = [value for entry in config.applications if (value := getattr(entry, what)) is not None]
        if twice := next((value for value in given if given.count(value) > 1), None):
            raise ConfigError(f"{path}: two applications have the {what} {twice!r}")
    for application in config.applications:
        args = apps[application.name]
        names = list(deployment_names(model.id for model in args.models).values())
        names.append(ANCHOR if isinstance(args, ModelAppArgs) else INGRESS)
        for entry in application.deployments:
            if entry.name not in names:
                where = f"deployments of application {application.name!r}"
                raise ConfigError(f"{path}: {where}: there is no {entry.name!r}; known: {', '.join(sorted(names))}")


def _user_config(application: _Application) -> IngressUserConfig | None:
    for deployment in application.deployments:
        if deployment.name == INGRESS and deployment.user_config is not None:
            return IngressUserConfig.from_dict(deployment.user_config, f"{INGRESS}.user_config")
    return None


def _check_names(path: Path, apps: dict[str, AnyAppArgs], user_configs: dict[str, IngressUserConfig]) -> None:
    """Each ingress's names point to models that are there; it would say so only once it starts."""
    for name, args in apps.items():
        if isinstance(args, ModelAppArgs):
            continue
        config = user_configs.get(name, IngressUserConfig())
        if isinstance(args, IngressAppArgs) and not config.models:
            raise ConfigError(
                f"{path}: application {name!r} has no models: list them in the user_config of its deployment {INGRESS}"
            )
        for entry in config.models:
            other = apps.get(entry.application)
            if other is None or entry.id not in [model.id for model in other.models]:
                raise ConfigError(
                    f"{path}: user_config.models: no application {entry.application!r} with a model {entry.id!r}"
                )
            (model,) = (model for model in other.models if model.id == entry.id)
            if missing := set(entry.adapters) - set(model.engine_config.adapters):
                raise ConfigError(
                    f"{path}: user_config.models: {entry.id!r} has no adapter {min(missing)!r} in application "
                    f"{entry.application!r}"
                )
        admitted = {model.id for model in args.models if model.admission is not None}
        if unknown := config.admission.keys() - admitted:
            raise ConfigError(
                f"{path}: user_config.admission: {min(unknown)!r} is no model with admission of application {name!r}"
            )
        served = {served_id for model in args.models for served_id in model.served_ids}
        served |= {entry.id for entry in config.models}
        served |= {f"{entry.id}:{adapter}" for entry in config.models for adapter in entry.adapters}
        targets = [*config.aliases.values(), *(target for split in config.splits.values() for target in split)]
        if absent := [target for target in targets if target not in served]:
            raise ConfigError(f"{path}: user_config: {absent[0]!r} is not served by application {name!r}")


def _check_nothing_dropped(path: Path, name: str, args: AnyAppArgs, config: IngressUserConfig) -> None:
    """A `user_config` in the file replaces the one that `args` make: keys would go, and everyone come in."""
    dropped = []
    if not isinstance(args, ModelAppArgs) and set(args.ingress.api_keys) - set(config.api_keys):
        dropped.append("args.ingress.api_keys")
    if isinstance(args, AppArgs):
        dropped += [f"the alias {alias!r}" for alias in args.aliases if alias not in config.aliases]
        dropped += [f"the split {split!r}" for split in args.splits if split not in config.splits]
    if dropped:
        raise ConfigError(
            f"{path}: application {name!r}: the user_config of its deployment {INGRESS} replaces what args say, and "
            f"would drop {', '.join(dropped)}: give them in user_config too"
        )


def check_ports_are_free(config: LoadedConfig) -> None:
    """ConfigError if something listens already where HTTP is to be, or HAProxy's own two ports; Serve would only time
    out, or say that HAProxy has crashed."""
    check_port_is_free(config.host, config.port)
    if config.haproxy:
        for variable, port in HAPROXY_PORTS.items():
            check_port_is_free("0.0.0.0", int(os.environ.get(variable, port)), f"set {variable} to another port")


def check_port_is_free(host: str, port: int, remedy: str = "change http_options.port") -> None:
    """ConfigError if something listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are still fading out counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it or {remedy}"
            ) from None


def _check_source(model: ModelArgs) -> None:
    try:
        split_decoder(open_checkpoint(model.source).model_config(), model.engine_config.tensor_parallel_size)
    except ModelLoadError as error:
        raise ModelLoadError(f"model {model.id!r}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"model {model.id!r}: {error}") from None
