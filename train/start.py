"""Starting a run from weights that exist: a Hugging Face Llama directory, or a checkpoint of another run.

Only the weights come along; the optimizer, the data order and the clock of tokens begin anew. What a run was started from
goes into its checkpoints, and a resumed run goes on from those.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama import checkpoint, model_source
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError, ConfigError
from tinyllama.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# They say how long an input may be and how new weights are drawn: nothing about weights that exist.
FREE = ("max_position_embeddings", "initializer_range")


def chosen(path: Path, wanted: ModelConfig) -> tuple[Path, str]:
    """The weights to start from (of a run: its newest whole checkpoint), and the sha256 of their names and checksums.

    Refuses a model that is not of the recipe's shape, by its first difference, and a damaged checkpoint. Reads every byte.
    """
    directory = check(path, wanted)
    digest = hashlib.sha256()
    for file in _files(directory):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return directory, digest.hexdigest()


def check(path: Path, wanted: ModelConfig) -> Path:
    """The same without reading the weights of a Hugging Face directory: of a checkpoint, every byte is compared."""
    source = model_source.find(path, "--init-from", local=True)
    source.check(ours=True, tokenizer=False)
    directory, found = source.path, source.llama()
    if source.is_checkpoint:
        checkpoint.verify(directory)
    elif source.config.get("quantization_config"):
        raise ConfigError(f"--init-from {path} is quantized", fix="start from the weights that it was made of")
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name not in FREE:
            raise ConfigError(
                f"--init-from {path} has {field.name}={theirs}, the recipe says model.{field.name}={ours}",
                fix=f"--set model.{field.name}={theirs}, or start from a model of this shape",
            )
    return directory


def _files(directory: Path) -> list[Path]:
    from tinyllama.model.hf import weight_files

    if checkpoint.is_checkpoint(directory):
        return sorted(directory.glob("shard-*.safetensors"))
    return weight_files(directory)


def refuse_other_start(old: dict | None, path: str | None, where: Path) -> None:
    """A resumed run goes on from its checkpoint: it cannot be given another start than it had."""
    if path is not None and (old is None or old["path"] != str(Path(path).expanduser().resolve())):
        raise CheckpointError(
            f"{where} was started from {old['path'] if old else 'new weights'}, not from {path}",
            fix="leave --init-from out to continue it, or give another --output",
        )


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, one at a time."""
    from tinyllama.model.hf import read_tensors

    if checkpoint.is_checkpoint(path):
        return checkpoint.read_weights(checkpoint.resolve(path))
    return read_tensors(path)
