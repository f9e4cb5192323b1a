"""Training checkpoints: the format, reading and checking. Needs torch and safetensors, not DeepSpeed.

    RUN/checkpoints/step-00000100/manifest.json          sha256 and size of every other file; written last
                                  state.json             step, tokens, optimizer steps, data position, ledgers, recipe,
                                                         DeepSpeed JSON, versions, commit, proof
                                  tokenizer.model        the tokenizer that made the data
                                  shard-00000.safetensors ...  what each rank held, as slices of flattened tensors
                                  rng-00000.json ...     the random generators of each rank

Every tensor (the fp32 weights, and Adam's `exp_avg` and `exp_avg_sq`) is stored as flat slices `kind|name|start`, so
that any number of ranks can read what any other number wrote. No pickle. A checkpoint exists once its folder has its
final name: it is written beside the others and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError
from tinyllama.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from tinyllama.model.llama import Llama

FORMAT = "tinyllama-checkpoint-1"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
WRITE_BYTES = 1 << 24
STEP_NAME = re.compile(r"^step-(\d+)$")


def step_name(step: int) -> str:
    """Folder name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def list_checkpoints(run: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run that has its final name, ordered by the step as a number."""
    root = Path(run) / "checkpoints"
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in root.iterdir() if (m := STEP_NAME.match(p.name)) and p.is_dir()]
    return sorted(found)


def resolve(path: str | os.PathLike[str]) -> Path:
    """A checkpoint folder from a checkpoint folder, or from a run directory (its newest checkpoint)."""
    given = Path(path)
    if (given / "manifest.json").exists() and (given / "state.json").exists():
        return given
    checkpoints = list_checkpoints(given)
    if checkpoints:
        return checkpoints[-1][1]
    raise CheckpointError(f"{given} is not a checkpoint", fix="give RUN/checkpoints/step-N or a run that has one")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `resolve` would find a checkpoint there."""
    try:
        resolve(path)
    except CheckpointError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; CheckpointError if missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", fix="use another checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})", fix="use another checkpoint") from None


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest; returns the state. CheckpointError names a bad file."""
    manifest = read_json(directory / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory} has format {manifest.get('format')!r}", fix=f"only {FORMAT} is supported")
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.exists() or path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its checksum", fix="use another checkpoint")
    return read_json(directory / "state.json")


def write_safetensors(path: Path, tensors: dict[str, Tensor], report: Callable[[int], None]) -> str:
    """Write flat fp32 tensors as a safetensors file that is on the disk when this returns; gives its sha256.

    Nothing is copied but a tensor that is not in host memory, one at a time. report: called with the bytes of each part.
    """
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        end = position + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for part in _parts(len(text).to_bytes(8, "little") + text, tensors):
            stream.write(part)
            digest.update(part)
            report(len(part))
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _parts(header: bytes, tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors.values():
        data = memoryview(tensor.cpu().numpy()).cast("B")
        for start in range(0, len(data), WRITE_BYTES):
            yield data[start : start + WRITE_BYTES]


class Slices:
    """Random access to the tensors of a checkpoint, as flat slices, whatever number of ranks wrote them."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.directory = directory
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._handles = []
        files = sorted(directory.glob("shard-*.safetensors"))
        for file in files:
            handle = safe_open(file, framework="pt")
            self._handles.append(handle)
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dictionary
                kind, name, start = key.split("|")
                length = handle.get_slice(key).get_shape()[0]
                self._pieces.setdefault((kind, name), []).append((int(start), int(start) + length, handle, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self._pieces

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """fp32 elements [start, stop) of the flattened tensor, shape (stop - start,)."""
        import torch

        parts, position = [], start
        for first, last, handle, key in self._pieces.get((kind, name), []):
            if position < stop and first <= position < last:
                end = min(stop, last)
                parts.append(handle.get_slice(key)[position - first : end - first])
                position = end
        if position != stop:
            raise CheckpointError(
                f"{self.directory}: {kind} of {name} lacks elements from {position}", fix="use another"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 tensor of every weight, one at a time, in the model's shapes."""
    from math import prod

    from tinyllama.model.hf import shapes

    slices = Slices(directory)
    for name, shape in shapes(model_config(directory)).items():
        yield name, slices.read(WEIGHT, name, 0, prod(shape)).reshape(shape)


def model_config(directory: Path) -> ModelConfig:
    """The shape of the model in a checkpoint."""
    return ModelConfig.from_dict(read_json(directory / "state.json")["recipe"]["model"])


def load_model(path: str | os.PathLike[str], dtype: str = "float32") -> tuple[Llama, Path]:
    """The model of a checkpoint (or of a run's newest) in eval mode, and its tokenizer.model. Checksums come first."""
    import torch

    from tinyllama.model.hf import DTYPES, fill
    from tinyllama.model.llama import Llama

    directory = resolve(path)
    verify(directory)
    with torch.device("meta"):
        model = Llama(model_config(directory))
    model = model.to_empty(device="cpu").to(DTYPES[dtype])
    fill(model, read_weights(directory), str(directory))
    return model.eval(), directory / "tokenizer.model"
