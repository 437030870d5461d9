"""The configs that the benchmark serves, and a small replay through real applications."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from app.config import AppArgs
from benchmarks.fleet.__main__ import main
from benchmarks.fleet.server import RAY_ROUTERS, fleet_config
from benchmarks.fleet.workload import FleetShape

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

SHAPE = FleetShape(4, 2, num_blocks=100, prefill_tokens_per_s=12000.0, scale=1 / 16, speed=3.0, step_s=0.02)


@pytest.mark.parametrize("router", ["cheapest", "lmetric", *RAY_ROUTERS])
def test_configs_are_sound_for_quire_and_for_serve(router: str) -> None:
    config = fleet_config(SHAPE, router, None, 8000)
    args = AppArgs.from_dict(config["applications"][0]["args"])
    engine = args.models[0].engine_config
    assert engine.device == "simulated:prefill=2250,step_ms=20"
    assert (engine.block_size, engine.num_blocks) == (32, 100)
    assert (args.models[0].deployment.num_replicas, args.ingress.num_replicas) == (4, 2)
    ServeDeploySchema.model_validate(config)


@pytest.mark.slow
@pytest.mark.ray
def test_a_replay_under_each_kind_of_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {
            "timestamp": 3000 * (n // 4),
            "input_length": 1500,
            "output_length": 48,
            "hash_ids": [n % 2, 10 + n % 2, 20 + n],
        }
        for n in range(12)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    for router in ("cheapest", "ray_prefix_aware"):
        main(["--trace", str(trace), "--replicas", "2", "--router", router, "--out", str(tmp_path / "out.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["replays"].keys() == {"cheapest", "ray_prefix_aware"}
    for entry in result["replays"].values():
        assert entry["failed"] == 0
        assert entry["requests"] == 12
        assert 0.0 < entry["hit_rate"] < 1.0
        assert entry["ttft_mean_s"] > (1 - entry["hit_rate"]) * 1500 / 12000, "what is not cached is computed"
