"""A public name shared out between several models by weight: how a new version gets its first share of requests."""

from __future__ import annotations

from collections.abc import Mapping


class WeightedSplit:
    """Chooses a target for each request, in the proportion of the weights.

    Smooth weighted round robin (as nginx does it): after any number of requests each target has had its share to within
    one request, and the turns of a small share are spread evenly. Nothing is random, so that counts are exact.

    Args:
        weights: target → weight, all above 0.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self._total = sum(self.weights.values())
        self._credit = dict.fromkeys(self.weights, 0.0)

    def next(self) -> str:
        """The target of the next request."""
        for target, weight in self.weights.items():
            self._credit[target] += weight
        chosen = max(self._credit, key=lambda target: self._credit[target])
        self._credit[chosen] -= self._total
        return chosen
