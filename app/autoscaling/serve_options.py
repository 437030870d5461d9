"""What Serve is told of a deployment that autoscales."""

from __future__ import annotations

import warnings

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from app.config import ScalingArgs

# By name: Serve imports and pickles it where the application is built.
POLICY = "app.autoscaling.policy:ReplicaSizingPolicy"
# Exports leave replicas this often. Serve calls the setting deprecated, and has no other for one deployment.
EXPORT_INTERVAL_S = 0.5
# Serve's own request counts are averages over this; only whether there are any matters here.
_LOOK_BACK_S = 2.0


def autoscaling_config(args: ScalingArgs) -> AutoscalingConfig:
    """Serve's side of it: bounds, our policy, and none of Serve's delays, as the policy has its own."""
    rules = args.model_dump(exclude={"initial_replicas"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*metrics_interval_s.*deprecated", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            initial_replicas=args.initial_replicas,
            metrics_interval_s=EXPORT_INTERVAL_S,
            look_back_period_s=_LOOK_BACK_S,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=rules),  # type: ignore[no-untyped-call]
        )
