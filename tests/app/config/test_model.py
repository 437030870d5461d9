from __future__ import annotations

from typing import Any

import pytest

from app.config import AppArgs, ModelArgs
from engine.errors import ConfigError
from tests.app.config.arguments import args, model


def test_unknown_engine_options_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        AppArgs.from_dict(args(model(engine={"x": 1})))


def test_engine_options_become_an_engine_config() -> None:
    config = ModelArgs(id="m", source="x", engine={"block_size": 32, "max_num_seqs": 3}).engine_config
    assert (config.block_size, config.max_num_seqs) == (32, 3)


def test_a_models_adapters_become_engine_options_and_names() -> None:
    entry = ModelArgs.from_dict(model(id="m", adapters={"sql": "/a/sql"}, engine={"max_loras": 2}), "model")
    assert entry.engine_options == {"enable_lora": True, "max_loras": 2, "adapters": {"sql": "/a/sql"}}
    assert entry.engine_config.enable_lora
    assert entry.served_ids == ["m", "m:sql"]
    assert ModelArgs.from_dict(model(id="m"), "model").engine_options == {}
    both = AppArgs.from_dict(args(model(id="m", adapters={"sql": "x"}), splits={"s": {"m": 1.0, "m:sql": 1.0}}))
    assert both.splits["s"] == {"m": 1.0, "m:sql": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": {"a:b": "x"}}, r"models\[0\]: adapters: 'a:b' must begin with a letter"),
        ({"adapters": {"a": "x"}, "engine": {"enable_lora": True, "adapters": {"b": "y"}}}, "give them in one place"),
        ({"adapters": {"a": "x"}, "engine": {"enable_lora": False}}, "adapters need enable_lora=true"),
        ({"adapters": {"a": "x"}, "engine": {"device": "simulated:h200"}}, "enable_lora=True means nothing on device"),
        ({"id": "m", "adapters": {"a": "x"}, "aliases": ["m:a"]}, "the model name 'm:a' is given twice"),
    ],
)
def test_adapters_that_contradict_other_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AppArgs.from_dict(args(model(**fields)))


def test_serve_may_not_keep_requests_from_an_engine_that_has_room() -> None:
    few = model(engine={"max_num_seqs": 64}, deployment={"max_ongoing_requests": 63})
    with pytest.raises(ConfigError, match=r"max_ongoing_requests=63 is below engine.max_num_seqs=64"):
        AppArgs.from_dict(args(few))
    AppArgs.from_dict(args(model(engine={"max_num_seqs": 63}, deployment={"max_ongoing_requests": 63})))
