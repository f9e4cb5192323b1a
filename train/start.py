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

from tinyllama import checkpoint
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError, ConfigError
from tinyllama.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# They say how long an input may be and how new weights are drawn: nothing about weights that exist.
FREE = ("max_position_embeddings", "initializer_range")


def check(path: Path, wanted: ModelConfig) -> None:
    """Refuse, without reading weights, a start that is not a model of the recipe's shape, by its first difference."""
    if checkpoint.is_checkpoint(path):
        found = checkpoint.model_config(checkpoint.resolve(path))
    elif not path.is_dir():
        raise ConfigError(
            f"--init-from {path} does not exist", fix="give a Hugging Face Llama directory or a checkpoint"
        )
    else:
        from tinyllama.model.hf import weight_files

        found = ModelConfig.from_hf(path)
        weight_files(path)
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name not in FREE:
            raise ConfigError(
                f"--init-from {path} has {field.name}={theirs}, the recipe says model.{field.name}={ours}",
                fix=f"--set model.{field.name}={theirs}, or start from a model of this shape",
            )


def refuse_other_start(old: dict | None, path: str | None, where: Path) -> None:
    """A resumed run goes on from its checkpoint: it cannot be given another start than it had."""
    if path is not None and (old is None or old["path"] != str(Path(path).resolve())):
        raise CheckpointError(
            f"{where} was started from {old['path'] if old else 'new weights'}, not from {path}",
            fix="leave --init-from out to continue it, or give another --output",
        )


def sha256(path: Path) -> str:
    """Of the weights: of the names and checksums of their files. Reads all of them, and checks a checkpoint's."""
    from tinyllama.model.hf import weight_files

    digest = hashlib.sha256()
    if checkpoint.is_checkpoint(path):
        directory = checkpoint.resolve(path)
        checkpoint.verify(directory)
        files = sorted(directory.glob("shard-*.safetensors"))
    else:
        files = weight_files(path)
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, one at a time."""
    from tinyllama.model.hf import read_tensors

    if checkpoint.is_checkpoint(path):
        return checkpoint.read_weights(checkpoint.resolve(path))
    return read_tensors(path)
