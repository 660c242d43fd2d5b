"""The networks: spectral convolutions with and without a spectral transformer, and a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncspec.convolution import SpectralConvolution
from syncspec.features import NUM_FEATURES, POSITION
from syncspec.transformer import SpectralTransformer

NETWORKS = ("spectral", "points", "coordinates")


@dataclass(frozen=True)
class Design:
    """The sizes of a network. These are for small sets; `PAPER` has the paper's."""

    network: str = "spectral"  # or a perceptron: on all features ("points"), on xyz ("coordinates")
    kernel: str = "dilated"
    transformer: bool = True
    channels: int = 24
    dilations: tuple[float, ...] = (4.0, 16.0, 32.0, 4.0)
    num_synchronised: int = 15  # eigenvectors that the functional map takes
    num_joint: int = 45
    grid: int = 12
    transformer_channels: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network is {self.network!r}; it must be one of {NETWORKS}")
        if self.grid < 4 or self.grid % 4:
            raise ValueError(f"grid is {self.grid}; it must be a multiple of 4")
        if len(self.dilations) < 2:
            raise ValueError(f"dilations is {self.dilations}; there must be at least 2")

    def to_json(self) -> dict[str, object]:
        return asdict(self)


# As in the paper and its published code: 50 channels, voxels of a grid of 20.
PAPER = Design(channels=50, grid=20, transformer_channels=50, dropout=0.2)


class Batch(NamedTuple):
    """Shapes with equally many points."""

    features: Tensor  # [B, N, F]
    frequencies: Tensor  # [B, K]
    vectors: Tensor  # [B, N, K]
    cells: Tensor  # [B, N, 3], voxels


class Prediction(NamedTuple):
    scores: Tensor  # [B, N, outputs]
    functional_maps: Tensor | None  # [B, D, J]


class ChannelNorm(nn.BatchNorm1d):
    """Batch normalisation of every channel over points and shapes. [B, N, C]"""

    def forward(self, function: Tensor) -> Tensor:
        normed: Tensor = super().forward(function.flatten(0, 1))
        return normed.view_as(function)


class Block(nn.Module):
    """A spectral convolution, a pointwise map, and a way around both."""

    def __init__(
        self, channels_in: int, channels_out: int, dilation: float, design: Design
    ) -> None:
        super().__init__()
        self.convolve = SpectralConvolution(channels_in, channels_out, dilation, design.kernel)
        self.first_norm, self.second_norm = ChannelNorm(channels_out), ChannelNorm(channels_out)
        self.mix = nn.Linear(channels_out, channels_out)
        self.around = nn.Linear(channels_in, channels_out)
        self.dropout = nn.Dropout(design.dropout)

    def forward(self, function: Tensor, batch: Batch) -> Tensor:
        """[B, N, C_in] -> [B, N, C_out]"""
        inner = self.convolve(function, batch.frequencies, batch.vectors)
        inner = self.dropout(self.first_norm(inner).relu())
        inner = self.second_norm(self.mix(inner))
        out: Tensor = self.dropout((inner + self.around(function)).relu())
        return out


class SynchronisedConvolution(nn.Module):
    """Multiplies by a matrix of channels at each frequency of the joint basis.

    The lowest D coefficients of a function go through C into the joint basis and come back by its
    transpose, so that all shapes of a category share these matrices.
    """

    def __init__(self, channels: int, num_joint: int) -> None:
        super().__init__()
        weight = torch.randn(num_joint, channels, channels) / channels**0.5
        self.weight = nn.Parameter(weight)
        self.norm = ChannelNorm(channels)

    def forward(self, function: Tensor, vectors: Tensor, functional_maps: Tensor) -> Tensor:
        """[B, N, C], [B, N, D], [B, D, J] -> [B, N, C]"""
        spectrum = functional_maps.transpose(1, 2) @ (vectors.transpose(1, 2) @ function)
        product = torch.einsum("bjc,jcd->bjd", spectrum, self.weight)
        out: Tensor = self.norm(vectors @ (functional_maps @ product))
        return out


class SpectralNetwork(nn.Module):
    """Blocks of growing dilation, synchronised convolutions, a last block, and scores."""

    def __init__(self, num_outputs: int, design: Design) -> None:
        super().__init__()
        self.design = design
        wide = 2 * design.channels
        sizes = [NUM_FEATURES, *[design.channels] * (len(design.dilations) - 2), wide]
        steps = zip(pairwise(sizes), design.dilations[:-1], strict=True)
        self.blocks = nn.ModuleList(Block(a, b, g, design) for (a, b), g in steps)
        self.last = Block(wide, wide, design.dilations[-1], design)
        self.scores = nn.Linear(wide, num_outputs)
        if design.transformer:
            self.transformer = SpectralTransformer(
                design.num_joint, design.grid, design.transformer_channels
            )
            self.synchronised = nn.ModuleList(
                SynchronisedConvolution(wide, design.num_joint) for _ in range(3)
            )

    def forward(self, batch: Batch) -> Prediction:
        function = batch.features
        for block in self.blocks:
            function = block(function, batch)
        maps = None
        if self.design.transformer:
            maps = self.functional_maps(batch)
            function = self._synchronise(function, batch, maps)
        return Prediction(self.scores(self.last(function, batch)), maps)

    def functional_maps(self, batch: Batch) -> Tensor:
        """[B, D, J]"""
        maps: Tensor = self.transformer(
            batch.vectors[..., : self.design.num_synchronised], batch.cells
        )
        return maps

    def _synchronise(self, function: Tensor, batch: Batch, maps: Tensor) -> Tensor:
        vectors = batch.vectors[..., : self.design.num_synchronised]
        inner = function
        for number, convolve in enumerate(self.synchronised):
            inner = convolve(inner if number == 0 else inner.relu(), vectors, maps)
        return function + inner


class PointNetwork(nn.Module):
    """The baseline: a perceptron that sees every point by itself."""

    def __init__(self, num_outputs: int, design: Design, width: int = 128) -> None:
        super().__init__()
        self.columns = POSITION if design.network == "coordinates" else slice(0, NUM_FEATURES)
        sizes = [3 if design.network == "coordinates" else NUM_FEATURES, width, width, width]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), ChannelNorm(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, num_outputs))

    def forward(self, batch: Batch) -> Prediction:
        return Prediction(self.body(batch.features[..., self.columns]), None)


def build(num_outputs: int, design: Design) -> SpectralNetwork | PointNetwork:
    """The network of a design, with fresh weights."""
    if design.network == "spectral":
        return SpectralNetwork(num_outputs, design)
    return PointNetwork(num_outputs, design)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of shapes with equally many points, as one."""
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
