"""Weight files on disk: find them, list what is in them without reading it, read one tensor at a time.

A checkpoint is one file (``.safetensors``, ``.pt``, ``.pth``, ``.bin``) or a folder of shards with an index. Tensors
are memory-mapped, so at most the shard being read counts towards memory. Nothing is unpickled but tensors.
"""

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError  # only the exception: torch's weights-only reader raises it
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})$")

# What constructors of other libraries raise on settings that make no sense.
_UNSOUND = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, ImportError, StrictDataclassError)

TORCH_DAMAGE = (
    *(RuntimeError, UnpicklingError, EOFError, OSError, struct.error, LookupError, ValueError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, zipfile.BadZipFile),
)
"""What torch's unpickler raises on bytes that are none of its own."""

# What trainers put around a flat dict of weights, and before its names.
_WRAPPERS = ("state_dict", "model", "module")
_PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "_orig_mod.", "model.")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Reader(Protocol):
    """Reads a tensor by name, or only some of its rows (along the first axis)."""

    def __call__(self, name: str, rows: slice | None = None) -> torch.Tensor: ...


class CheckpointError(ValueError):
    """Weights or a checkpoint folder that cannot be used; the message is one line that names it and what is wrong."""


class TensorInfo(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> "TensorInfo":
        """The same tensor in another dtype; None, and numbers that are no floating point, stay."""
        return self if dtype is None or not self.dtype.is_floating_point else self._replace(dtype=dtype)


class WeightFile:
    """One file of named tensors.

    Wrappers (``{"state_dict": ...}``, ``{"model": ...}``, ``{"module": ...}``) and prefixes that all names share
    (``module.``, ``diffusion_model.`` ...) are taken off.

    Raises:
        CheckpointError: the file is missing, truncated, or holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path}: weights end in {', '.join(SUFFIXES)}")
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, from headers only."""
        return {name.removeprefix(self.prefix): info for name, info in self._raw.items()}

    @cached_property
    def prefix(self) -> str:
        """What was taken off all names."""
        return next((p for p in _PREFIXES if self._raw and all(name.startswith(p) for name in self._raw)), "")

    @cached_property
    def _raw(self) -> dict[str, TensorInfo]:
        if self.path.suffix == ".safetensors":
            return _safetensors_header(self.path)
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in _torch_tensors(self.path).items()}

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """Read tensors by name while the block runs; they are views of the mapped file: copy what shall outlive it."""
        if self.path.suffix == ".safetensors":
            try:
                with safe_open(self.path, framework="pt", device="cpu") as handle:

                    def read(name: str, rows: slice | None = None) -> torch.Tensor:
                        name = self.prefix + name
                        return handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]

                    yield read
            except SafetensorError as error:
                raise CheckpointError(f"{self.path}: {error}") from error
        else:
            data = _torch_tensors(self.path)
            yield lambda name, rows=None: data[self.prefix + name][... if rows is None else rows]


class Weights:
    """All files of a checkpoint as one set of named tensors.

    Attributes:
        source: the file or folder, for messages.
        files: the files in reading order.

    Raises:
        CheckpointError: a name stands in two files.
    """

    def __init__(self, source: Path, files: list[WeightFile]) -> None:
        self.source, self.files = source, files
        self.tensors: dict[str, TensorInfo] = {}
        self.place: dict[str, WeightFile] = {}
        for file in files:
            twice = sorted(self.tensors.keys() & file.tensors.keys())
            if twice:
                raise CheckpointError(f"{file.path}: {list_names(twice)} also in {self.place[twice[0]].path.name}")
            self.tensors |= file.tensors
            self.place |= dict.fromkeys(file.tensors, file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors, as stored or with floating point cast to ``dtype``."""
        return sum(info.cast(dtype).nbytes for info in self.tensors.values())

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """Read tensors by name while the block runs; only the file read last is mapped."""
        with ExitStack() as stack:
            current: WeightFile | None = None
            reader: Reader | None = None

            def read(name: str, rows: slice | None = None) -> torch.Tensor:
                nonlocal current, reader
                if self.place[name] is not current or reader is None:
                    current = self.place[name]
                    reader = None
                    stack.close()
                    reader = stack.enter_context(current.opened())
                return reader(name, rows)

            yield read


def open_weights(path: Path) -> Weights:
    """The weights of a file, or of a folder (index and shards, or one file).

    Raises:
        CheckpointError: nothing there, shards are missing, or the index and the shards disagree.
    """
    if path.is_file():
        return Weights(path, [WeightFile(path)])
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for suffix in (".safetensors", ".bin"):
        for stem in _STEMS:
            index, single = path / f"{stem}{suffix}.index.json", path / f"{stem}{suffix}"
            if index.is_file() and single.is_file():
                raise CheckpointError(f"{path}: holds both {index.name} and {single.name}: keep one")
            if index.is_file():
                return _open_indexed(path, index)
            if single.is_file():
                return Weights(path, [WeightFile(single)])
            shards = sorted(path.glob(f"{stem}-*-of-*{suffix}"))
            if shards:
                return _open_shards(path, shards)
    names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"{path}: no weights (diffusion_pytorch_model.safetensors or its shards); it holds {names}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


@contextmanager
def sound_settings(place: Path) -> Iterator[None]:
    """Build something from the settings at ``place``; that they make no sense, constructors say in many ways.

    Raises:
        CheckpointError: for any of them.
    """
    try:
        yield
    except _UNSOUND as error:
        raise CheckpointError(f"{place}: its settings do not fit ({' '.join(str(error).split())[:200]})") from error


def list_names(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _open_indexed(folder: Path, index: Path) -> Weights:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{index}: no weight_map: not an index of weights")
    names = sorted(set(listed.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{index}: names {len(absent)} missing of {len(names)} shards: {list_names(absent)}")
    weights = Weights(folder, [WeightFile(folder / name) for name in names])
    wrong = [
        name for name, file in listed.items() if name not in weights.place or weights.place[name].path.name != file
    ]
    if wrong:
        raise CheckpointError(f"{index}: says of {len(wrong)} tensors what the shards do not hold: {list_names(wrong)}")
    return weights


def _open_shards(folder: Path, shards: list[Path]) -> Weights:
    parts = [match for shard in shards if (match := _SHARD.match(shard.stem))]
    count = int(parts[0]["count"]) if parts else 0
    missing = sorted(set(range(1, count + 1)) - {int(part["index"]) for part in parts})
    if missing or len(parts) != count:
        raise CheckpointError(f"{folder}: {len(parts)} of {count} shards, and no index; missing: {missing}")
    return Weights(folder, [WeightFile(shard) for shard in shards])


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file: 8 bytes of its length, then JSON; checks that the file is all there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    if not all(
        isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys() for entry in header.values()
    ):
        raise CheckpointError(f"{path}: not a safetensors file (its header lists no tensors)")
    unknown = sorted({entry["dtype"] for entry in header.values()} - _SAFETENSORS_DTYPES.keys())
    if unknown:
        raise CheckpointError(f"{path}: dtypes {', '.join(unknown)} are not supported")
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise CheckpointError(f"{path}: truncated: {size} bytes of {end}; download it again")
    return {
        name: TensorInfo(tuple(entry["shape"]), _SAFETENSORS_DTYPES[entry["dtype"]]) for name, entry in header.items()
    }


def _torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The flat dict of tensors in a torch file, mapped where its format (zip) allows."""
    try:
        data = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except TORCH_DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated, or not a file of plain weights ({reason[:160]})") from error
    for wrapper in _WRAPPERS:
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
            break
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path}: holds no dict of tensors")
    foreign = [str(name) for name, value in data.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise CheckpointError(f"{path}: {list_names(foreign)} are no tensors: give a flat file of weights")
    return data
