"""What lies in a Hugging Face directory: its JSON files, its weight files and their headers. Torch-free.

Here the bytes that somebody else wrote become our objects, or one line that says what is wrong with them: before a
process imports torch, and long before anything is loaded. `headers` reads safetensors as their specification has it
(https://github.com/huggingface/safetensors): 8 bytes of length, a JSON header, the data without holes.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from tinyllama.errors import CheckpointError, ConfigError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHER_LAYOUTS = (
    "consolidated.",
    "consolidated-",
)  # their authors' own names of tensors, which transformers never reads
LFS_POINTER = b"version https://git-lfs"
MAX_JSON_BYTES, MAX_HEADER_BYTES = 1 << 30, 100_000_000  # the second is safetensors' own
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")
# Old files hold the frequencies of RoPE too, which follow from the configuration.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
DOWNLOAD = "download it again (git lfs pull)"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as its file's header has it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def _regular(path: Path) -> int:
    """Bytes of a file. OSError for what is none: a pipe or a device has no end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return found.st_size


def read_object(path: Path, fix: str = "export the model again, or download it again") -> dict[str, Any]:
    """A JSON object. ConfigError for a file that is missing, unreadable or none; for a key that stands there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
        return found

    try:
        if _regular(path) > MAX_JSON_BYTES:
            raise ValueError("it is larger than 1 GiB")
        content = path.read_bytes()
        if content.startswith(LFS_POINTER):
            raise ConfigError(f"{path} is a git-lfs pointer: its content was not downloaded", fix=DOWNLOAD)
        found = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", fix="give a complete Hugging Face directory") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", fix="give a file that you may read") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", fix=fix) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})", fix=fix) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object but {type(found).__name__}", fix=fix)
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory, with the parts that every reader relies on checked for their types."""
    path = directory / CONFIG
    raw = read_object(path)
    if not isinstance(raw.get("model_type"), str):
        raise ConfigError(
            f"{path}: model_type={raw.get('model_type')!r}", fix="give a Hugging Face model's config.json"
        )
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ConfigError(f"{path}: architectures={named!r} is not a list of names", fix="export the model again")
    quantization = raw.get("quantization_config")
    if quantization is not None and not (isinstance(quantization, dict) and quantization):
        raise ConfigError(f"{path}: quantization_config={quantization!r} is not an object", fix="quantize it again")
    return raw


@dataclasses.dataclass(frozen=True)
class Weights:
    """The one set of weights of a directory. names: of tensors by the index, with their file; None without index."""

    files: list[Path]
    names: dict[str, str] | None

    @property
    def safetensors(self) -> bool:
        return self.files[0].suffix == ".safetensors"


def find_weights(directory: Path) -> Weights:
    """The weight files, in the order of transformers: the single file, shards with their index, the same of torch's format.
    CheckpointError for none, for files that are missing, and for another set that is not the same weights.
    """
    sets = _sets(directory)
    listed = {file.name for one in sets for file in one.files}
    others = sorted(
        path
        for pattern in ("*.safetensors", "pytorch_model*.bin")
        for path in directory.glob(pattern)
        if path.name not in listed and not path.name.startswith(OTHER_LAYOUTS) and not _is_pointer(path)
    )
    if not sets:
        if others:
            raise CheckpointError(
                f"{directory} has {others[0].name}, but neither {SINGLE} nor {INDEX}",
                fix="give a complete Hugging Face directory",
            )
        raise CheckpointError(
            f"{directory} has a config.json but no weights", fix="give a complete Hugging Face directory"
        )
    for file in sets[0].files:
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist", fix="give a complete Hugging Face directory")
    for other in sets[1:] + [Weights([file], None) for file in others]:
        _refuse_another(directory, sets[0], other, part=other.files[0] in others)
    return sets[0]


def refuse_what_vllm_prefers(directory: Path) -> None:
    """CheckpointError for a Llama's directory in which vLLM would take other weights than transformers and this toolkit."""
    for file in sorted(directory.glob("consolidated*.safetensors")):
        raise CheckpointError(
            f"{directory} holds two sets of weights, and vLLM would read {file.name}: which one?",
            fix="move away the files that are not meant",
        )


def _sets(directory: Path) -> list[Weights]:
    """Every set of weights of a directory. In torch's format one that was not downloaded is none beside safetensors."""
    found: list[Weights] = []
    for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        names = _weight_map(directory / index) if os.path.lexists(directory / index) else None
        shards = None if names is None else Weights([directory / name for name in sorted(set(names.values()))], names)
        if shards and directory / single in shards.files and len(shards.files) > 1:
            raise CheckpointError(
                f"{directory / index} lists {single} among its files, which transformers reads alone",
                fix="download it again",
            )
        if os.path.lexists(directory / single) and (shards is None or directory / single not in shards.files):
            found.append(Weights([directory / single], None))
        if shards:
            found.append(shards)
    return found[:1] + [one for one in found[1:] if one.safetensors or not all(map(_is_absent, one.files))]


def _refuse_another(directory: Path, chosen: Weights, other: Weights, part: bool) -> None:
    """Refuse a second set of weights unless it is the same as the chosen one."""
    from tinyllama.model.duplicates import difference

    here = [file for file in other.files if not _is_absent(file)]
    differs = "files of the second are missing"
    if here and (len(here) == len(other.files) or not other.safetensors):
        differs = difference(chosen.files, here, part=part or len(here) < len(other.files)) or ""
    if differs:
        raise CheckpointError(
            f"{directory} holds two sets of weights, {_called(chosen)} and {_called(other)}: which one? ({differs})",
            fix="move away the files that are not meant",
        )


def _is_absent(file: Path) -> bool:
    """Whether a file was not downloaded."""
    return not file.is_file() or _is_pointer(file)


def _is_pointer(file: Path) -> bool:
    """Whether it is what git leaves where the content was not downloaded."""
    try:
        _regular(file)
        with open(file, "rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _called(weights: Weights) -> str:
    first = weights.files[0].name
    if weights.names is None:
        return first
    return f"the files of {INDEX if weights.safetensors else BIN_INDEX} ({first} ...)"


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names and their files by an index. CheckpointError for anything that is no plain file name beside it."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no weight_map", fix="export the model again, or download it again")
    for name, file in found.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file not in ("", ".", "..")
        if not plain or "\0" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(
                f"{index}: {name} lies in {file!r}, which is no file beside it", fix="download it again"
            )
    return found


def headers(file: Path) -> dict[str, Stored]:
    """Name, dtype and shape of each tensor of a safetensors file. CheckpointError for a file that is damaged anywhere but in
    its numbers.
    """

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is corrupt ({what})", fix="export the model again, or download it again")

    size = checked_size(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise damaged("its header is cut off, or it is no safetensors file")
        text = stream.read(length)
    try:
        pairs = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: pairs)
        entries = [(name, dict(entry)) for name, entry in pairs]
        if any(len(dict(entry)) < len(entry) for _, entry in pairs):
            raise ValueError("a key stands there twice")
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(f"its header is not JSON: {error}") from None
    found: dict[str, Stored] = {}
    spans = []
    for name, entry in entries:
        if name == "__metadata__":
            if not all(isinstance(text, str) for text in entry.values()):
                raise damaged("its metadata are not texts")
            continue
        if name in found:
            raise damaged(f"{name} stands there twice")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape") or [], entry.get("data_offsets") or []
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise damaged(f"{name} is of the unknown type {dtype!r}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise damaged(f"{name} has shape {shape!r} at {offsets!r}")
        elements = math.prod(shape)
        if offsets[1] - offsets[0] != -(-elements * DTYPE_BITS[dtype] // 8):
            raise damaged(f"{name}: {offsets[1] - offsets[0]} bytes for shape {shape} of {dtype}")
        spans.append(tuple(offsets))
        found[name] = Stored(file, dtype, tuple(shape))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise damaged(f"bytes {min(start, end)} to {max(start, end)} belong to no tensor, or to two")
        end = stop
    if end != size - 8 - length:
        raise damaged(f"{size - 8 - length} bytes of data where its header says {end}")
    return found


def _counts(values: Any) -> bool:
    """Whether it is a list of whole numbers, 0 or more."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def checked_size(file: Path) -> int:
    """Bytes of a file that has any, and is not what git leaves where the content was not downloaded."""
    try:
        size = _regular(file)
        with open(file, "rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror})", fix="give a file that you may read"
        ) from None
    if not size:
        raise CheckpointError(f"{file} is empty", fix="export the model again, or download it again")
    if start == LFS_POINTER:
        raise CheckpointError(f"{file} is a git-lfs pointer: its content was not downloaded", fix=DOWNLOAD)
    return size


def tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory of safetensors, in the order of the files. CheckpointError where an index and the files
    do not say the same.
    """
    weights = find_weights(directory)
    if not weights.safetensors:
        raise CheckpointError(
            f"{weights.files[0]} is not in safetensors, which alone is read here",
            fix="save it with safe_serialization=True, or use --backend hf",
        )
    return _tensors(weights)


def _tensors(weights: Weights) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in weights.files:
        for name, stored in headers(file).items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in {found[name].file} and in {file}: which one?", fix="download it again"
                )
            if weights.names is not None and not name.endswith(IGNORED_SUFFIX) and weights.names.get(name) != file.name:
                said = weights.names.get(name)
                where = f"in {said}" if said else "nowhere"
                raise CheckpointError(f"{name} is in {file}, by the index {where}", fix="download it again")
            found[name] = stored
    for name, file_name in (weights.names or {}).items():
        if name not in found and not name.endswith(IGNORED_SUFFIX):
            raise CheckpointError(
                f"{weights.files[0].parent / file_name} lacks {name}, which the index says it has",
                fix="download it again",
            )
    return found


Shapes = Iterable[tuple[str, tuple[int, ...]]]


def check_weights(
    directory: Path, expected: Shapes | None, *, optional: Set[str] = frozenset(), whole: bool = True
) -> None:
    """Refuse weights that are damaged, or not those of the configuration.

    expected, optional, whole: as of `check_shapes`, for a model that is not quantized; expected None where its architecture
    is not known here. Of files in torch's own format only that they are whole is seen.
    """
    weights = find_weights(directory)
    if not weights.safetensors:
        for file in weights.files:
            _check_pickle(file)
        return
    found = _tensors(weights)
    if expected is None:
        return
    check_shapes({n: t.shape for n, t in found.items()}, expected, str(directory), optional=optional, whole=whole)
    for name, tensor in found.items():
        if whole and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.file}: {name} is of type {tensor.dtype}, and config.json has no quantization_config",
                fix="use the configuration that the weights were quantized with",
            )


def check_quantized(directory: Path, expected: Shapes) -> None:
    """The same for quantized weights, whose matrices are stored in parts: of each there must be some, and what is not a
    matrix must be as `expected` says.
    """
    check_weights(directory, None)
    if not find_weights(directory).safetensors:
        return
    found = {name: tensor.shape for name, tensor in tensors(directory).items()}
    modules = {name.rpartition(".")[0] for name in found}
    for name, shape in expected:
        module = name.removesuffix(".weight")
        if module.endswith(("_proj", "lm_head")) and name.endswith(".weight"):
            if module not in modules:
                raise CheckpointError(f"{directory}: {module} is missing", fix="quantize the model again")
        elif found.get(name) != shape:
            check_shapes(found, [(name, shape)], str(directory), whole=False)


def _check_pickle(file: Path) -> None:
    """Refuse what torch.load could not: its archives are zip files, older ones pickles."""
    checked_size(file)
    with open(file, "rb") as stream:
        start = stream.read(2)
    if not (start[:1] == b"\x80" or (start == b"PK" and zipfile.is_zipfile(file))):
        raise CheckpointError(f"{file} is corrupt (cut off, or no weights)", fix="download it again")


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    expected: Shapes,
    where: str,
    *,
    optional: Set[str] = frozenset(),
    whole: bool = True,
) -> None:
    """Refuse a set of tensors that is not exactly the expected: missing, misshapen, or (if it is the whole) unexpected, but
    for the optional ones. The first missing one ends it, so that a configuration of a billion layers does.
    """
    known = set(optional)
    for name, shape in expected:
        known.add(name)
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing", fix="write it again from a complete checkpoint")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(found[name])}, the configuration says {shape}",
                fix="use the configuration that the weights were trained with",
            )
    for name in found:
        if whole and name not in known and not name.endswith(IGNORED_SUFFIX):
            raise CheckpointError(
                f"{where}: unexpected tensor {name}, which a model of this configuration does not have",
                fix="use the configuration that the weights were trained with; only plain Llama models are supported",
            )
