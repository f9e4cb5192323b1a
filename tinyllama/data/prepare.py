"""Documents to a token store: what is asked for, checked and carried out by an executor.

The result depends on the inputs, the tokenizer and the settings alone: not on workers, executors, or interruptions.
Killed at any moment and run again, only unfinished input files are tokenized again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllama.data.documents import Rules
from tinyllama.data.executors import ClusterOptions, Totals, run_local, run_ray, submit_slurm
from tinyllama.data.inputs import SUFFIXES, find_inputs
from tinyllama.data.store import SHARD_TOKENS, Manifest, read_manifest
from tinyllama.data.work import Plan, Settings, Work, cannot_write, read_json
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    rules: Rules | None = None,
    suffixes: tuple[str, ...] = SUFFIXES,
    validation_fraction: float = 0.01,
    seed: int = 1337,
    workers: int | None = None,
    executor: str = "local",
    cluster: ClusterOptions | None = None,
    shard_tokens: int = SHARD_TOKENS,
    plain: bool = False,
    overwrite: bool = False,
    progress: Callable[[Totals], None] | None = None,
) -> Manifest | list[str]:
    """Tokenize `inputs` into the store `output`. Returns its manifest, or with Slurm the ids of the submitted jobs.

    inputs: files, folders, or fsspec addresses. validation_fraction: share of documents held out, by their text and
    `seed`. workers: processes, default all cores; 0 works in this process. plain: SentencePiece without the cache of
    words. DataError on unreadable input, no space, and where `output` is something else and not to be overwritten.
    """
    target = Path(output).resolve()
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation fraction {validation_fraction}", fix="give a number from 0 to below 1")
    if not 0 <= seed < 2**64:
        raise DataError(f"seed {seed}", fix="give a number from 0 to below 2^64")
    if shard_tokens < 1 or (workers is not None and workers < 0):
        raise DataError(f"shard tokens {shard_tokens}, workers {workers}", fix="give numbers above zero")
    settings = Settings(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.bos_id,
        validation_fraction=validation_fraction,
        seed=seed,
        rules=rules or Rules(),
        shard_tokens=shard_tokens,
    )
    plan = Plan(settings, tuple(find_inputs(inputs, suffixes)))
    ours = [target.with_name(target.name + suffix) for suffix in ("", ".partial", ".replaced")]
    for file in plan.files:
        if file.is_local and not set(ours).isdisjoint(Path(file.address).resolve().parents):
            raise DataError(f"--output {target} would replace the input {file.address}", fix="give another --output")
    for given in inputs:
        if "://" not in str(given) and Path(given).is_dir() and Path(given).resolve() in target.resolve().parents:
            raise DataError(f"--output {target} lies inside the input {given}", fix="give another --output")
    work = Work(ours[1], plan)
    if ours[1].exists() and not ((ours[1] / "lock").exists() and ours[1].is_dir()) and any(ours[1].iterdir()):
        raise DataError(f"{ours[1]} is not an unfinished store", fix="move it away, or give another --output")
    if target.exists():
        is_store = (target / "manifest.json").exists()
        if is_store and (read_json(target / "prepared.json") or {}).get("plan") == plan.key:
            shutil.rmtree(work.folder, ignore_errors=True)
            return read_manifest(target)
        if not is_store and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target} exists and is not a token store", fix="give another --output")
        if is_store and not overwrite:
            raise DataError(
                f"{target} is a store of other inputs or settings", fix="give another --output, or --overwrite"
            )
    try:
        with work.lock():
            work.begin()
            shutil.copyfile(tokenizer.path, work.folder / "tokenizer.model")
            if executor == "slurm":
                return submit_slurm(work, target, cluster or ClusterOptions(), plain)
            if executor == "ray":
                run_ray(work, target, cluster or ClusterOptions(), plain)
            elif executor == "local":
                run_local(work, target, os.cpu_count() or 1 if workers is None else workers, plain, progress)
            else:
                raise DataError(f"executor {executor!r}", fix="give local, slurm or ray")
    except OSError as error:
        raise cannot_write(error, work.folder) from None
    return read_manifest(target)
