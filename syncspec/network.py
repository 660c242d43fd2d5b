"""The networks: spectral convolutions with and without a spectral transformer, and a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncspec.convolution import SpectralConvolution
from syncspec.features import INPUTS, NUM_FEATURES
from syncspec.graph import WEIGHTS
from syncspec.transformer import SpectralTransformer

NETWORKS = ("spectral", "points")


@dataclass(frozen=True)
class Design:
    """The sizes of a network. These are for small sets; `PAPER` has the paper's."""

    network: str = "spectral"  # or "points", a perceptron
    inputs: str = "all"  # of `INPUTS`
    kernel: str = "dilated"
    transformer: bool = True
    channels: int = 24
    dilations: tuple[float, ...] = (4.0, 16.0, 32.0, 4.0)
    num_synchronised: int = 15  # eigenvectors that the functional map takes
    num_joint: int = 45
    grid: int = 12
    transformer_channels: int = 8
    transformer_width: int = 256
    dropout: float = 0.0
    weights: str = WEIGHTS[0]  # of the graph's edges
    tied: bool = False  # pieces that lie apart, by an edge

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network is {self.network!r}; it must be one of {NETWORKS}")
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs is {self.inputs!r}; it must be one of {list(INPUTS)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is {self.weights!r}; it must be one of {WEIGHTS}")
        if self.grid < 4 or self.grid % 4:
            raise ValueError(f"grid is {self.grid}; it must be a multiple of 4")
        if len(self.dilations) < 2:
            raise ValueError(f"dilations is {self.dilations}; there must be at least 2")

    @property
    def columns(self) -> slice:
        """Of the features that the network sees."""
        return INPUTS[self.inputs]

    @property
    def num_features(self) -> int:
        return len(range(*self.columns.indices(NUM_FEATURES)))


# As in the paper and its published code: 50 channels, voxels of a grid of 20. Many shapes of
# ShapeNet, earphones above all, are pieces that lie apart.
PAPER = Design(
    channels=50, grid=20, transformer_channels=50, transformer_width=200, dropout=0.2, tied=True
)


class Batch(NamedTuple):
    """Shapes with equally many points."""

    features: Tensor  # [B, N, F]
    frequencies: Tensor  # [B, K]
    vectors: Tensor  # [B, N, K]
    cells: Tensor  # [B, N, 3], voxels


def moved(batch: Batch, device: torch.device) -> Batch:
    """The same batch in the memory of a device."""
    return Batch(*(tensor.to(device) for tensor in batch))


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
        sizes = [design.num_features, *[design.channels] * (len(design.dilations) - 2), wide]
        steps = zip(pairwise(sizes), design.dilations[:-1], strict=True)
        self.blocks = nn.ModuleList(Block(a, b, g, design) for (a, b), g in steps)
        self.last = Block(wide, wide, design.dilations[-1], design)
        self.scores = nn.Linear(wide, num_outputs)
        if design.transformer:
            self.transformer = SpectralTransformer(
                design.num_joint, design.grid, design.transformer_channels, design.transformer_width
            )
            layers = [SynchronisedConvolution(wide, design.num_joint) for _ in range(3)]
            # At the start the network is the one without them.
            nn.init.zeros_(layers[-1].norm.weight)
            self.synchronised = nn.ModuleList(layers)
            self.dropout = nn.Dropout(design.dropout)

    def forward(self, batch: Batch) -> Prediction:
        function = batch.features[..., self.design.columns]
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
            inner = convolve(self.dropout(inner.relu()) if number else inner, vectors, maps)
        return function + inner


class PointNetwork(nn.Module):
    """The baseline: a perceptron that sees every point by itself."""

    def __init__(self, num_outputs: int, design: Design, width: int = 128) -> None:
        super().__init__()
        self.columns = design.columns
        sizes = [design.num_features, width, width, width]
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
