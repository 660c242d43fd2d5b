"""The header of a GGUF file: metadata and the offset of every tensor. Imports no torch.

We read the header ourselves because `gguf.GGUFReader` builds several numpy objects per array
element, which takes seconds for a vocabulary at every start of a server. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALAR_IDS = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
SCALARS = dict(zip(SCALAR_IDS, "BbHhIif?Qqd", strict=True))  # type -> struct format
UINT32, UINT64 = struct.Struct("<I"), struct.Struct("<Q")
MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies in the file. `shape` is row-major; the file has the reverse order."""

    name: str
    type_id: int  # a GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    path: Path  # of the file


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A parsed header: the first `header_size` bytes, which hold everything but the weights."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    header_size: int
    size: int


def read_gguf(path: Path) -> GGUFFile:
    """Parse the header. ValueError naming the file if it is not GGUF, truncated or damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data, path).parse()
    except (struct.error, IndexError) as error:
        raise ValueError(f"{path} is truncated: its header ends early") from error
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is not a usable GGUF file: {error}") from error


class _Header:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def parse(self) -> GGUFFile:
        if self._data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._take(UINT32)
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not supported; {VERSIONS} are")
        num_tensors, num_fields = self._take(UINT64), self._take(UINT64)
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            metadata[key] = self._value(self._take(UINT32))
        places = [self._tensor_place() for _ in range(num_tensors)]
        base = self._aligned(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        tensors = {
            name: GGUFTensor(name, type_id, shape, base + offset, self._path)
            for name, type_id, shape, offset in places
        }
        if len(tensors) != len(places):
            raise ValueError("two tensors have the same name")
        return GGUFFile(self._path, metadata, tensors, self._at, len(self._data))

    def _aligned(self, alignment: int) -> int:
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r} is not a positive integer")
        return -(-self._at // alignment) * alignment

    def _tensor_place(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._take(UINT32)
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._take(UINT64) for _ in range(dimensions))[::-1]
        return name, self._take(UINT32), shape, self._take(UINT64)

    def _value(self, type_id: int) -> Any:
        if type_id == STRING:
            return self._string()
        if type_id == ARRAY:
            return self._array()
        if type_id not in SCALARS:
            raise ValueError(f"unknown metadata type {type_id}")
        return self._take(struct.Struct("<" + SCALARS[type_id]))

    def _array(self) -> list[Any]:
        type_id, count = self._take(UINT32), self._take(UINT64)
        if count > len(self._data):
            raise IndexError("array longer than the file")
        if type_id in SCALARS:
            layout = struct.Struct(f"<{count}{SCALARS[type_id]}")
            values = layout.unpack_from(self._data, self._at)
            self._at += layout.size
            return list(values)
        if type_id == STRING:
            return [self._string() for _ in range(count)]
        return [self._value(type_id) for _ in range(count)]

    def _string(self) -> str:
        (length,) = UINT64.unpack_from(self._data, self._at)
        start = self._at + 8
        self._at = start + length
        if self._at > len(self._data):
            raise IndexError("string longer than the file")
        return str(self._data[start : self._at], "utf-8")

    def _take(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return value
