"""Finds the quantised weights among the tensors of a safetensors checkpoint."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from engine.checkpoints.manifest import listed
from engine.checkpoints.quantised.config import Layout, Quantisation, Scheme
from engine.checkpoints.quantised.groups import (
    StoredGroups,
    awq_shape,
    check_parts,
    gptq_shape,
    packed_shape,
)
from engine.checkpoints.quantised.scaled import (
    FP8_DTYPE,
    SCALE_NAMES,
    ExpertOf,
    ScalesOf,
    StoredScaled,
)
from engine.checkpoints.stored import View, require_matrix

# The tensor that shows how a weight is stored, what else it needs, and what it may have
PARTS: dict[Layout, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "packed": ("weight_packed", ("weight_scale", "weight_shape"), ("weight_g_idx",)),
    "awq": ("qweight", ("qzeros", "scales"), ()),
    "gptq": ("qweight", ("qzeros", "scales"), ("g_idx",)),
}
INPUT_SCALES = ("input_scale", "input_scale_ub")
FUSED = re.compile(r"(?P<stem>.*\.experts)\.(?P<part>gate_up|down)_proj")

logger = logging.getLogger(__name__)

QuantisedTensor = StoredScaled | StoredGroups


@dataclass(slots=True)
class QuantisedWeights:
    """The quantised weights of a checkpoint by the name that the plain weight would have, and the
    names of all tensors that belong to them."""

    views: Mapping[str, View]  # all tensors of the text model
    quantisation: Quantisation
    prefix: str  # of their names in the file
    weights: dict[str, QuantisedTensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, views: Mapping[str, View], quantisation: Quantisation, prefix: str, origin: object
    ) -> QuantisedWeights:
        """ValueError naming a tensor that is missing, or that the configuration contradicts."""
        found = cls(views, quantisation, prefix)
        try:
            for name in views:
                found._take(name)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        found._say(origin)
        return found

    def _take(self, name: str) -> None:
        stem, _, end = name.rpartition(".")
        if end in ("weight_packed", "qweight"):
            self._take_groups(stem)
        elif self._is_fp8(name) and end == "weight":
            self._take_scaled(stem)
        elif self._is_fp8(name) and FUSED.fullmatch(name):
            self._take_experts(name)

    def _is_fp8(self, name: str) -> bool:
        return self.views[name].get_dtype() == FP8_DTYPE

    def _scheme(self, stem: str) -> Scheme:
        names = [stem, self.prefix + stem, f"model.{self.prefix}{stem.removeprefix('model.')}"]
        scheme = self.quantisation.scheme(names)
        if scheme is None:
            raise ValueError(
                f"the weight of {stem} is stored quantised, but quantization_config leaves it out"
            )
        return scheme

    def _take_groups(self, stem: str) -> None:
        scheme = self._scheme(stem)
        mark, needed, optional = PARTS.get(scheme.layout, ("weight", (), ()))
        if scheme.layout == "packed" and not scheme.symmetric:
            needed = (*needed, "weight_zero_point")
        views = self._parts(stem, (mark, *needed), optional)
        check_parts(views, stem)
        weight = StoredGroups(SHAPES[scheme.layout](views), views, scheme)
        weight.check(stem)
        self.weights[f"{stem}.weight"] = weight

    def _take_scaled(self, stem: str) -> None:
        scheme = self._scheme(stem)
        if scheme.layout != "fp8":
            raise ValueError(f"tensor {stem}.weight is FP8, but quantization_config has other bits")
        scale = next((s for s in SCALE_NAMES if f"{stem}.{s}" in self.views), SCALE_NAMES[0])
        views = self._parts(stem, ("weight", scale), INPUT_SCALES)
        require_matrix(views["weight"], f"{stem}.weight")
        weight = StoredScaled(views["weight"], views[scale], scheme)
        weight.check(f"{stem}.{scale}")
        self.weights[f"{stem}.weight"] = weight

    def _take_experts(self, name: str) -> None:
        """The tensor of all experts as a linear layer for each."""
        match = FUSED.fullmatch(name)
        assert match is not None
        scheme, scales = self._scheme(name), f"{name}_scale"
        if scheme.strategy != "channel" or scales not in self.views:
            raise ValueError(f"tensor {name} of all experts needs {scales}, one for each output")
        self.used |= {name, scales}
        self._check_experts(name, scales)
        count, _, outputs = self.views[name].get_shape()
        for expert in range(count):
            for part, bounds in _sides(match["part"], outputs):
                values = ExpertOf(self.views[name], expert, bounds)
                weight = StoredScaled(values, ScalesOf(self.views[scales], expert, bounds), scheme)
                weight.check(scales)
                self.weights[f"{match['stem']}.{expert}.{part}_proj.weight"] = weight

    def _check_experts(self, name: str, scales: str) -> None:
        """Weights are [experts, in, out], scales [experts, 1, out] or [experts, out, 1]."""
        shape, found = self.views[name].get_shape(), self.views[scales].get_shape()
        if len(shape) != 3:
            raise ValueError(f"tensor {name} has shape {shape}; that of all experts has three axes")
        allowed = [[shape[0], 1, shape[2]], [shape[0], shape[2], 1]]
        if found not in allowed:
            raise ValueError(
                f"tensor {scales} has shape {found}; for experts {shape} it is "
                f"{allowed[0]} or {allowed[1]}"
            )

    def _parts(
        self, stem: str, needed: tuple[str, ...], optional: tuple[str, ...]
    ) -> dict[str, View]:
        missing = [f"{stem}.{part}" for part in needed if f"{stem}.{part}" not in self.views]
        if missing:
            raise ValueError(f"missing tensor {listed(missing)}")
        there = [*needed, *(part for part in optional if f"{stem}.{part}" in self.views)]
        self.used |= {f"{stem}.{part}" for part in there}
        return {part: self.views[f"{stem}.{part}"] for part in there}

    def _say(self, origin: object) -> None:
        """Log what was found, and scales that have no use here."""
        kinds = Counter(
            f"{each.scheme.layout}, {each.scheme.strategy}" for each in self.weights.values()
        )
        for kind, count in kinds.items():
            logger.info("%s: %d weights are quantised (%s)", origin, count, kind)
        inputs = sorted(name for name in self.used if name.endswith(".input_scale"))
        if inputs:
            logger.warning(
                "%s: %s are not used: where activations are rounded to FP8, each token has a scale "
                "of its own",
                origin,
                listed(inputs),
            )


def _sides(part: str, outputs: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The linear layers that an experts' tensor holds, and their outputs."""
    if part == "down":
        yield "down", (0, outputs)
        return
    half = outputs // 2
    yield "gate", (0, half)
    yield "up", (half, outputs)


SHAPES = {"packed": packed_shape, "awq": awq_shape, "gptq": gptq_shape}
