"""What `aerie plan` knows about GPUs, and about how well the code uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import Field, ValidationError

from configs.files import read_text
from configs.load import ConfigError
from configs.schema import Number, Positive, Section
from configs.values import parse, typed

FOLDER = Path(__file__).parent
CALIBRATION = FOLDER / "plan" / "calibration.yaml"

Kind = TypeVar("Kind", bound=Section)

Rate = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(gt=0, le=1)]
Microseconds = Annotated[Number, Field(ge=0)]
Count = Annotated[Number, Field(ge=0)]


class Gpu(Section):
    """The data sheet of a GPU: peaks that no program reaches."""

    memory_bytes: Positive
    memory_bytes_per_second: Rate
    bf16_flops_per_second: Rate = Field(description="dense products, multiply and add counted")
    fp8_flops_per_second: Rate
    link_bytes_per_second: Rate = Field(description="to the other GPUs, in one direction")


class Calibration(Section):
    """How much of a GPU's peaks the kernels reach, and what each of them costs at least."""

    memory_share: Share = Field(description="of the peak, reading weights and activations")
    cache_share: Share = Field(description="of the peak, reading keys and values")
    compute_share: Share = Field(description="of the peak, in large products")
    attention_compute_share: Share = Field(description="of the peak, attention of long prompts")
    attention_half_tokens: Count = Field(
        description="prompt tokens in a step at which attention reaches half of that"
    )
    product_us: Microseconds = Field(description="of a product, beside its bytes and operations")
    attention_us: Microseconds = Field(description="of a layer's attention, beside its bytes")
    attention_row_us: Microseconds = Field(description="the same, added by every row")
    attention_node_us: Microseconds = Field(
        description="the same, added by every further node of a row's draft tree"
    )
    kernel_us: Microseconds = Field(description="of any other kernel, launch included")
    split_reductions: Count = Field(description="kernels of a layer that sum parts of products")
    round_kernels: Count = Field(description="kernels of a round that belong to no layer")
    draft_kernels: Count = Field(description="more kernels of a round that drafts, once")
    level_kernels: Count = Field(description="of a level of drafts that belong to no layer")
    moe_kernels: Count = Field(description="of a layer with experts: routing, sorting, adding")
    logit_reads: Count = Field(description="drawing a token takes so many float32 reads of logits")
    draft_logit_reads: Count = Field(description="the same of ranking drafts")
    all_reduce_us: Microseconds = Field(description="of a sum over several GPUs, beside its bytes")
    link_share: Share = Field(description="of the peak, in large sums over GPUs")
    host_us: Microseconds = Field(description="of a round that does not run ahead")
    host_row_us: Microseconds = Field(description="the same, added by every row")
    host_node_us: Microseconds = Field(description="the same, added by every node of a draft tree")


def shipped_gpus() -> dict[str, Path]:
    """Names and paths of the files under configs/gpu."""
    return {file.stem: file for file in sorted((FOLDER / "gpu").glob("*.yaml"))}


def load_gpu(name: str) -> Gpu:
    """The GPU of a shipped file, or of a path. ConfigError if it is missing or invalid."""
    path = shipped_gpus().get(name, Path(name))
    if not path.exists():
        known = ", ".join(shipped_gpus())
        raise ConfigError(f"no GPU {name!r}; known: {known}, or the path of a file like theirs")
    return _read(Gpu, path)


def load_calibration(path: Path = CALIBRATION) -> Calibration:
    """ConfigError if the file cannot be read or is wrong."""
    return _read(Calibration, path)


def shipped_models() -> dict[str, Path]:
    """Hub ids of the models whose sizes ship with the package, and the files that hold them."""
    files = sorted((FOLDER / "models").glob("*.json"))
    return {_hub_id(file.stem): file for file in files}


def shipped_heads() -> dict[str, Path]:
    """The same of draft heads, and the directories that hold their config.json."""
    files = sorted((FOLDER / "heads").glob("*/config.json"))
    return {_hub_id(file.parent.name): file.parent for file in files}


def _hub_id(name: str) -> str:
    return name.replace("--", "/", 1)


def _read(kind: type[Kind], path: Path) -> Kind:
    try:
        return kind.model_validate(typed(parse(read_text(path)), kind))
    except ValidationError as error:
        wrong = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise ConfigError(f"{path}: {wrong}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
