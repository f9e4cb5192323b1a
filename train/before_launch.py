"""What can be wrong with a run and be known before it is launched: its data, its folder, the checkpoint it goes on from.

`tinyllama train` asks all of it before it starts a process, and `--dry-run` the same; the ranks ask what they need again.
Nothing is written. ConfigError, DataError and CheckpointError say what, the value and the fix.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama import checkpoint
from tinyllama.data.durable import refuse_foreign
from tinyllama.data.loader import HeldOut, Mixture
from tinyllama.data.store import file_sha256
from tinyllama.errors import CheckpointError, ConfigError
from tinyllama.model import fp8
from train import evaluation, start
from train import plan as planning
from train.recipe import Recipe
from train.schedule import refuse_jump
from train.state import refuse_other_run

WRITTEN = ("metrics.jsonl", "config.json", "spikes.jsonl")  # what a run writes again in its folder,
ON_THE_WAY = ("metrics.partial", "config.partial", "spikes.partial")  # first under these names,
OF_RANKS = ("heartbeats", "stacks")  # and of each rank, in these folders


def find_tokenizer(given: str | Path | None, data: str | Path, mixture: Mixture) -> Path | None:
    """The tokenizer.model that made the data: given, or beside the stores. Its checksum must be the stores'."""
    path = Path(given) if given else Path(data) / "tokenizer.model"
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        if given:
            raise ConfigError(
                f"tokenizer {given} does not exist", fix="give the tokenizer.model that made the data"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {path} cannot be read ({error})", fix="give a readable tokenizer.model") from None
    if found != mixture.tokenizer_sha256:
        raise ConfigError(f"tokenizer {path} did not make these stores", fix="give the tokenizer.model that did")
    return path


def check_data(recipe: Recipe, data: Path, tokenizer: Path | None) -> Mixture:
    """The mixture of a run whose data, held-out windows and tokenizer are all there. Reads the shards of those windows."""
    mixture = planning.open_mixture(recipe, data)
    found = find_tokenizer(tokenizer, data, mixture)
    for source in mixture.sources:
        HeldOut(source, recipe.data.sequence_length).check(recipe.validation.max_sequences)
    evaluation.check(recipe, found)
    return mixture


def check_precision(recipe: Recipe, deepspeed: dict[str, Any], here: bool) -> None:
    """UserError if float8 products are asked for and cannot be had. here: of this machine, which a dry run is not about."""
    if recipe.training.precision != "fp8":
        return
    fp8.refuse_without_bf16(deepspeed.get("bf16", {}).get("enabled", False))
    model = recipe.model
    rows = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    sizes = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size}
    sizes["(num_attention_heads + 2 num_key_value_heads) x head size"] = rows
    if reason := fp8.refusal("", (0, 0), {f"model.{name}": size for name, size in sizes.items()}):
        raise ConfigError(f"training.precision='fp8' {reason}", fix=fp8.FIX)
    if here:
        fp8.refuse_without_torchao()


def check_output(run: Path) -> None:
    """ConfigError if a run could not write its folder, its checkpoints or its metrics."""
    of_ranks = [run / name for name in OF_RANKS]
    for folder in (run, run / "checkpoints", *of_ranks):
        _check_folder(folder)
    files = [run / name for name in (*WRITTEN, *ON_THE_WAY)]
    for path in (*files, *(path for folder in of_ranks for path in sorted(folder.glob("rank-*")))):
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.W_OK)):
            raise ConfigError(
                f"{path} cannot be written", fix="remove it, grant write permission, or give another --output"
            )
    # An export has a config.json, too, without which its weights are lost.
    refuse_foreign(run / "config.json", _is_config, "that of a training run")
    refuse_foreign(run / "metrics.jsonl", _is_metrics, "that of a training run")


def _is_config(text: str) -> bool:
    try:
        return "recipe" in json.loads(text)
    except (ValueError, RecursionError, TypeError):
        return False


def _is_metrics(text: str) -> bool:
    """By the first line: the last one may be cut short."""
    try:
        return "step" in json.loads(text.partition("\n")[0])
    except (ValueError, RecursionError, TypeError):
        return not text.strip("\0") or "\n" not in text


def _check_folder(folder: Path) -> None:
    """Of a folder that is not there yet, its nearest ancestor must let it be made."""
    path = folder.absolute()
    while True:
        try:
            mode = path.stat().st_mode
            break
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                raise ConfigError(f"{path} is a link to nothing", fix="remove it, or give another --output") from None
            path = path.parent
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{path} cannot be a folder ({why})", fix="give another --output") from None
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{path} is not a folder", fix="give another --output")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written", fix="grant write permission, or give another --output")


def choose_checkpoint(
    run: Path, resume: str, check: Callable[[Path], dict[str, Any]] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run goes on from, and its state; None for a new run. resume: auto, never or must.

    check: `checkpoint.verify`, or `checkpoint.inspect` where reading every byte is left to the ranks.
    """
    if resume == "never":
        if checkpoint.list_checkpoints(run):
            raise CheckpointError(f"{run} has checkpoints", fix="give another --output, or use --resume auto")
        return None
    found = checkpoint.newest_whole(run, check=check)
    if found is None and resume == "must":
        raise CheckpointError(f"{run} has no checkpoint", fix="check --output, or use --resume auto")
    return found


def check_resume(
    found: tuple[Path, dict[str, Any]],
    recipe: Recipe,
    mixture_sha256: str | None,
    init_from: str | Path | None,
    allow_jump: bool,
) -> str | None:
    """Refuse a checkpoint of another run, another start or another rate; one line where the rate changes by less.

    mixture_sha256: None where the data are not there yet, in a dry run.
    """
    where, old = found
    refuse_other_run(old, recipe, mixture_sha256, where)
    if old["step"] > recipe.num_steps:
        raise CheckpointError(
            f"{where} has been trained for {old['step']:,} steps, this recipe says {recipe.num_steps:,}",
            fix=f"give training.tokens={old['step'] * recipe.training.batch_tokens} or more, or another --output",
        )
    start.refuse_other_start(old.get("init_from"), str(init_from) if init_from else None, where)
    return refuse_jump(old, recipe, where, allow_jump)
