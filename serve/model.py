"""From what the user names to a Hugging Face directory that vLLM loads; a checkpoint is exported, once for its content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tinyllama import checkpoint
from tinyllama.data.store import file_sha256
from tinyllama.errors import UserError


def cache_directory() -> Path:
    """Where exports of checkpoints are kept: TINYLLAMA_CACHE, or below the user's cache folder."""
    base = os.environ.get("TINYLLAMA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tinyllama"
    return Path(base).expanduser()


def resolve(model: str, say: Callable[[str], None]) -> str:
    """A directory, or a hub id as it is. UserError if it is neither a model, a checkpoint nor a possible hub id."""
    path = Path(model)
    if not path.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise UserError(f"model {model} does not exist", fix="give a directory, a checkpoint or owner/name")
        return model
    if (path / "config.json").exists() and not checkpoint.list_checkpoints(path):
        return str(path)
    if not path.is_dir() or not checkpoint.is_checkpoint(path):
        raise UserError(
            f"{model} is neither a Hugging Face directory nor a checkpoint", fix="export it: tinyllama export"
        )
    from tinyllama.export import RECORD, export_checkpoint

    source = checkpoint.resolve(path)
    # The manifest names a checksum of every other file: its own checksum stands for the content.
    target = cache_directory() / "exports" / file_sha256(source / "manifest.json")[:32]
    if not (target / RECORD).exists():
        say(f"exporting {source} to {target}")
        export_checkpoint(source, target)
    return str(target)
