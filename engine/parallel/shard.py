"""Which part of each tensor a rank of a tensor-parallel group holds. Pure arithmetic, no torch.

Heads and the feed-forward width are cut into equal parts. KV heads are cut too; if there are fewer
of them than ranks, several neighbouring ranks hold each. Vocabularies and other sizes that are cut
with `padded` need not divide by the number of ranks: every rank holds the same number of rows, and
rows after the end are zeros. The parts of all ranks, concatenated and cut at the true size, give
the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import ExpertCut
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.llama4_arch import Llama4Arch

MAX_RANKS = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"

    def even(self, total: int) -> slice:
        """This rank's part of `total`, which must divide by the number of ranks."""
        assert total % self.size == 0, f"{total} does not divide by {self.size} ranks"
        width = total // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def kv_heads(self, total: int) -> slice:
        """The KV heads that this rank's query heads attend to."""
        if total % self.size == 0:
            return self.even(total)
        assert self.size % total == 0, f"{total} KV heads over {self.size} ranks"
        head = self.rank * total // self.size
        return slice(head, head + 1)

    def num_kv_heads(self, total: int) -> int:
        """How many KV heads this rank's cache holds per slot."""
        heads = self.kv_heads(total)
        return int(heads.stop - heads.start)

    def padded_width(self, total: int) -> int:
        """Rows that each rank holds of `total` rows, including padding after the end."""
        return -(-total // self.size)

    def padded(self, total: int) -> slice:
        """This rank's rows without padding; an empty slice if it holds only padding."""
        width = self.padded_width(total)
        return slice(min(self.rank * width, total), min((self.rank + 1) * width, total))


WHOLE = Shard()


def kv_copies(num_kv_heads: int, size: int) -> int:
    """How many ranks hold each KV head."""
    return max(1, size // num_kv_heads)


def degree_fault(arch: LlamaArch, size: int) -> str | None:
    """Why `arch` cannot be cut into `size` parts, None if it can."""
    if arch.num_heads % size:
        return f"{arch.num_heads} attention heads do not divide by {size}"
    if arch.num_kv_heads % size and size % arch.num_kv_heads:
        return f"{arch.num_kv_heads} KV heads neither divide by {size} nor divide it"
    for width in arch.feed_forward_sizes:
        if width % size:
            return f"intermediate_size {width} does not divide by {size}"
    return None


def allowed_degrees(arch: LlamaArch) -> list[int]:
    """Numbers of ranks over which `arch` can be cut."""
    return [size for size in range(1, MAX_RANKS + 1) if degree_fault(arch, size) is None]


def check_degree(arch: LlamaArch, size: int, setting: str = "parallel.tensor") -> None:
    """ValueError with the reason and the allowed sizes if `arch` cannot be cut into `size`."""
    fault = degree_fault(arch, size)
    if fault is not None:
        allowed = ", ".join(str(degree) for degree in allowed_degrees(arch))
        raise ValueError(f"{setting} = {size}: {fault}; this model allows {allowed}")


def check_experts(arch: LlamaArch, cut: ExpertCut, size: int) -> None:
    """ValueError if the experts of `arch` cannot be spread over `size` ranks as whole ones."""
    if cut == "tensor":
        return
    if not isinstance(arch, Llama4Arch) or not arch.moe_layers:
        raise no_experts()
    check_whole_experts(arch.num_experts, size)


def no_experts() -> ValueError:
    """The error for a dense model whose experts were to be spread."""
    return ValueError("parallel.experts = expert: this model has no experts; tensor is possible")


def check_whole_experts(num_experts: int, size: int) -> None:
    """ValueError if `size` ranks cannot hold equally many experts."""
    if num_experts % size:
        raise ValueError(
            f"parallel.experts = expert: {num_experts} experts do not divide by {size} ranks; "
            "tensor is possible"
        )
