"""Training checkpoints: the format, reading and checking. Needs torch and safetensors, not DeepSpeed.

    RUN/checkpoints/step-00000100/manifest.json          sha256 and size of every other file; written last
                                  state.json             step, tokens, optimizer steps, data position, ledgers, recipe,
                                                         DeepSpeed JSON, versions, commit, proof
                                  tokenizer.model        the tokenizer that made the data
                                  shard-00000.safetensors ...  what each rank held, as slices of flattened tensors
                                  rng-00000.json ...     the random generators of each rank

Every tensor (the fp32 weights, and Adam's `exp_avg` and `exp_avg_sq`) is stored as flat slices `kind|name|start`, so
that any number of ranks can read what any other number wrote. No pickle. A checkpoint exists once its folder has its
final name: it is written beside the others and renamed. It is whole if every byte is what was written: `verify` compares
each file with the manifest, and the manifest with the one form in which it is written. Of a run the newest whole checkpoint
counts; those that are not are named, and stay where they are.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama import strict_json
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError, ConfigError
from tinyllama.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from tinyllama.model.llama import Llama

FORMAT = "tinyllama-checkpoint-1"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
WRITE_BYTES = 1 << 24
STEP_NAME = re.compile(r"^step-([0-9]{1,18})$")
SHARD, GENERATORS = "shard-{:05d}.safetensors", "rng-{:05d}.json"
ANOTHER = "use another checkpoint"
MOST_RANKS = 1 << 20
# What `state.json` must have, and what it may: an older release did not write all of it.
STATE: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "tokens": int,
    "optimizer_steps": int,
    "ranks": int,
    "mixture_sha256": str,
    "recipe": dict,
}
STATE_MAY: dict[str, type | tuple[type, ...]] = {
    "skipped_steps": int,
    "data_offset": int,
    "loss_window": list,
    "spikes": list,
    "epochs": dict,
    "batch": dict,
    "init_from": (dict, type(None)),
    "deepspeed": dict,
    "versions": dict,
    "git": dict,
    "proof": dict,
}
_whole: dict[
    tuple[Any, ...], dict[str, Any]
] = {}  # states of the checkpoints whose every byte was read, by `_identity`
_said: set[str] = set()


def step_name(step: int) -> str:
    """Folder name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def list_checkpoints(run: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, path) of all that has a checkpoint's final name in a run, whole or not, ordered by the step as a number."""
    root = Path(run) / "checkpoints"
    try:
        return sorted((int(m.group(1)), root / name) for name in os.listdir(root) if (m := STEP_NAME.match(name)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read ({error.strerror})", fix="grant read permission") from None


def newest_whole(
    run: str | os.PathLike[str],
    warn: Callable[[str], None] | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
    among: Callable[[int], bool] = lambda step: True,
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run, and its state; None if the run has none at all.

    CheckpointError if it has some and none is whole: what is left of them is never taken for a fresh start. warn: told of
    each that is skipped. check: `verify` or, without reading every byte, `inspect`. among: of these steps alone.
    """
    found = [(step, path) for step, path in list_checkpoints(run) if among(step)]
    skipped: list[str] = []
    chosen = None
    for _, directory in reversed(found):
        try:
            chosen = directory, (check or verify)(directory)
            break
        except CheckpointError as error:
            skipped.append(f"skipping checkpoint: {error.what}")
    for text in skipped:
        (warn or _say_once)(f"{text}; {chosen[0].name} is taken instead" if chosen else text)
    if found and chosen is None:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {Path(run) / 'checkpoints'} is whole",
            fix="restore one from a copy, or give another --output to start anew",
        )
    return chosen


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(f"warning: {text}", file=sys.stderr)


def resolve(path: str | os.PathLike[str]) -> Path:
    """A checkpoint folder from a checkpoint folder, or from a run directory: its newest whole checkpoint.

    A folder that was given itself is not exchanged for another: CheckpointError says what is wrong with it.
    """
    given = Path(path)
    if _is_folder_of_one(given):
        inspect(given)
        return given
    if newest := newest_whole(given):
        return newest[0]
    raise CheckpointError(f"{given} is not a checkpoint", fix="give RUN/checkpoints/step-N or a run that has one")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether this is meant as a checkpoint, or as a run that has one; not whether any of it is whole."""
    return _is_folder_of_one(Path(path)) or bool(list_checkpoints(path))


def _is_folder_of_one(path: Path) -> bool:
    if STEP_NAME.match(path.name) and path.absolute().parent.name == "checkpoints":
        return os.path.lexists(path)
    with contextlib.suppress(OSError):
        names = set(os.listdir(path))
        return {"manifest.json", "state.json"} <= names or (
            bool({"manifest.json", "state.json"} & names) and SHARD.format(0) in names
        )
    return False


def manifest_text(files: dict[str, Any], summed: bool = True) -> str:
    """The one form in which a manifest is written: every byte of it counts. summed: with a sum of its own, as ever since."""
    manifest: dict[str, Any] = {"format": FORMAT, "files": files}
    if summed:
        manifest["sha256"] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest, indent=1) + "\n"


def inspect(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint, after every check that needs not read its shards. CheckpointError says what is wrong."""
    files = _files(directory)
    for name, entry in files.items():
        path = directory / name
        with _explained(path):
            found = os.stat(path)
            good = stat.S_ISREG(found.st_mode) and found.st_size == entry["bytes"]
            if not good or (not _is_shard(name) and file_sha256(path) != entry["sha256"]):
                raise CheckpointError(f"{path} does not match its checksum", fix=ANOTHER)
    state = _read_state(directory)
    expected = {name.format(rank) for rank in range(state["ranks"]) for name in (SHARD, GENERATORS)}
    if lacking := sorted(expected - files.keys()):
        raise CheckpointError(f"{directory}: {lacking[0]} is not in its manifest", fix=ANOTHER)
    return state


def verify(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint, after comparing every byte of it with what was written. CheckpointError names a bad file.

    What a process has read once it does not read again, as long as no file has changed since.
    """
    from concurrent.futures import ThreadPoolExecutor

    state, files = inspect(directory), _files(directory)
    identity = _identity(directory, files)
    if identity not in _whole:
        shards = [name for name in files if _is_shard(name)]
        with ThreadPoolExecutor(4) as pool:  # hashing releases the lock
            for name, digest in zip(shards, pool.map(_sha256, (directory / name for name in shards)), strict=True):
                if digest != files[name]["sha256"]:
                    raise CheckpointError(f"{directory / name} does not match its checksum", fix=ANOTHER)
        _whole[identity] = state
    return copy.deepcopy(_whole[identity])


def _identity(directory: Path, files: dict[str, Any]) -> tuple[Any, ...]:
    found = []
    for name in sorted(files):
        with _explained(directory / name):
            entry = os.stat(directory / name)
        found.append((name, entry.st_size, entry.st_ino, entry.st_mtime_ns, entry.st_ctime_ns))
    return (os.path.realpath(directory), file_sha256(directory / "manifest.json"), *found)


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors")


def _sha256(path: Path) -> str:
    with _explained(path):
        return file_sha256(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of the operating system about one file of a checkpoint, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", fix=ANOTHER) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})", fix=ANOTHER) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; CheckpointError if missing or broken."""
    return _object(path, _read(path))


def _read(path: Path) -> bytes:
    with _explained(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{path} is no regular file", fix=ANOTHER)
        return path.read_bytes()


def _object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = strict_json.parse(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})", fix=ANOTHER) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object but {strict_json.kind(value)}", fix=ANOTHER)
    return value


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entry of each file, after a check of the manifest itself."""
    path = directory / "manifest.json"
    content = _read(path)
    manifest = _object(path, content)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory} has format {manifest.get('format')!r}", fix=f"only {FORMAT} is supported")
    files: Any = manifest.get("files")
    good = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        for entry in files.values()
    )
    plain = good and all(Path(name).name == name for name in files)
    if not plain or "state.json" not in files or content != manifest_text(files, "sha256" in manifest).encode():
        raise CheckpointError(f"{path} is not as it was written", fix=ANOTHER)
    return files


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / "state.json"
    state = read_json(path)
    for key, kinds in {**STATE, **STATE_MAY}.items():
        value = state.get(key)
        if key not in state and key in STATE_MAY:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{path}: {key} is missing, or not what it can be", fix=ANOTHER)
    if not isinstance(state["recipe"].get("model"), dict) or not 0 < state["ranks"] <= MOST_RANKS:
        raise CheckpointError(f"{path}: recipe.model or ranks is missing", fix=ANOTHER)
    if odd := _odd(state):
        raise CheckpointError(f"{path}: {odd} is not what it can be", fix=ANOTHER)
    try:
        ModelConfig.from_dict(state["recipe"]["model"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.what}", fix=f"{ANOTHER}, or the release that wrote it") from None
    named = STEP_NAME.match(directory.name)
    if named and int(named.group(1)) != state["step"]:
        raise CheckpointError(f"{path} is of step {state['step']}", fix="give the folder its own name again")
    return state


def _odd(state: dict[str, Any]) -> str | None:
    """What of a state's lists and sections a run that goes on from it could not read; None if nothing is."""
    recipe = state["recipe"]
    for name in ("data", "training", "optimizer"):
        if not isinstance(recipe.get(name, {}), dict):
            return f"recipe.{name}"
    for name in ("tokens", "batch_tokens"):
        value = recipe.get("training", {}).get(name, 1)
        if type(value) is not int or value < 1:
            return f"recipe.training.{name}"
    lists: tuple[tuple[str, Any, Any], ...] = (
        ("recipe.data.sources", recipe.get("data", {}).get("sources", []), dict),
        ("spikes", state.get("spikes", []), dict),
        ("loss_window", state.get("loss_window", []), int | float),
    )
    for name, found, kind in lists:
        if not isinstance(found, list) or not all(isinstance(entry, kind) for entry in found):
            return name
    if state.get("init_from") is not None and not isinstance(state["init_from"].get("path"), str):
        return "init_from"
    return None


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
        from safetensors import SafetensorError, safe_open

        self.directory = directory
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._handles = []
        for file in (directory / name for name in sorted(_files(directory)) if _is_shard(name)):
            try:
                with _explained(file):
                    handle = safe_open(file, framework="pt")
                self._handles.append(handle)
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dictionary
                    kind, name, start = key.split("|")
                    (length,) = handle.get_slice(key).get_shape()
                    self._pieces.setdefault((kind, name), []).append((int(start), int(start) + length, handle, key))
            except (SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file} is no shard of a checkpoint ({error})", fix=ANOTHER) from None
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
    return ModelConfig.from_dict(_read_state(directory)["recipe"]["model"])


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
