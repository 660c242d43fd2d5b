"""Collects the target's hidden states for a draft head."""

from __future__ import annotations

from torch import Tensor


class FeatureCollector:
    """Implements `FeatureTap`: keeps references to the current forward's hidden states. The model
    makes a new tensor for every tap."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._order = layers
        self.layers = frozenset(layers)
        self._seen: dict[int, Tensor] = {}

    def record(self, layer: int, hidden: Tensor) -> None:
        self._seen[layer] = hidden

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The features of the tokens `rows` [C], one [C, H] per tapped layer, in order."""
        return tuple(self._seen[layer][rows] for layer in self._order)

    @property
    def num_tokens(self) -> int:
        """Tokens of the current forward."""
        return len(self._seen[self._order[0]])

    def take_all(self) -> tuple[Tensor, ...]:
        """The features of all tokens."""
        return tuple(self._seen[layer] for layer in self._order)
