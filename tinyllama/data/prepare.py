"""Documents to a token store: what is asked for, checked and carried out by an executor.

The result depends on the inputs, the tokenizer and the settings alone: not on workers, executors, or interruptions.
Killed at any moment and run again, only unfinished input files are tokenized again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllama.data.defaults import SEED, SHARD_TOKENS, VALIDATION_FRACTION
from tinyllama.data.documents import Rules
from tinyllama.data.durable import cannot_write, has_format, read_json, refuse_foreign, refuse_root
from tinyllama.data.executors import ClusterOptions, Totals, refuse_running_jobs, run_local, run_ray, submit_slurm
from tinyllama.data.inputs import SUFFIXES, LeftOut, empty_line, find_inputs, left_out_line
from tinyllama.data.store import FORMAT, LISTS, SPLITS, Manifest, TokenStore, file_sha256, read_manifest
from tinyllama.data.work import Plan, Settings, Work, lock
from tinyllama.errors import DataError
from tinyllama.tokenizer.export import why_not
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

MOST_DOCUMENT_BYTES = 1 << 40


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    rules: Rules | None = None,
    suffixes: tuple[str, ...] = SUFFIXES,
    validation_fraction: float = VALIDATION_FRACTION,
    seed: int = SEED,
    workers: int | None = None,
    executor: str = "local",
    cluster: ClusterOptions | None = None,
    shard_tokens: int = SHARD_TOKENS,
    plain: bool = False,
    overwrite: bool = False,
    progress: Callable[[Totals], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Manifest | list[str]:
    """Tokenize `inputs` into the store `output`. Returns its manifest, or with Slurm the ids of the submitted jobs.

    inputs: files, folders, or fsspec addresses. validation_fraction: share of documents held out, by their text and
    `seed`. workers: processes, default all cores; 0 works in this process. plain: SentencePiece without the cache of
    words. overwrite: write the store anew, whatever is there. notice: told of files that were left out.
    DataError on unreadable input, no space, and where `output`
    is something else and not to be overwritten.
    """
    target = Path(output).resolve()
    refuse_root(target)
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation fraction {validation_fraction}", fix="give a number from 0 to below 1")
    if not 0 <= seed < 2**64:
        raise DataError(f"seed {seed}", fix="give a number from 0 to below 2^64")
    if shard_tokens < 1 or (workers is not None and workers < 0):
        raise DataError(f"shard tokens {shard_tokens}, workers {workers}", fix="give numbers above zero")
    rules = rules or Rules()
    if not 1 <= rules.max_document_bytes <= MOST_DOCUMENT_BYTES:
        raise DataError(
            f"max document bytes {rules.max_document_bytes}",
            fix=f"give a number from 1 to {MOST_DOCUMENT_BYTES:,}",
        )
    if executor not in ("local", "slurm", "ray"):
        raise DataError(f"executor {executor!r}", fix="give local, slurm or ray")
    settings = Settings(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.bos_id,
        validation_fraction=validation_fraction,
        seed=seed,
        rules=rules,
        shard_tokens=shard_tokens,
    )
    left_out: LeftOut = {}
    plan = Plan(settings, tuple(find_inputs(inputs, suffixes, left_out)))
    if executor != "local" and (secret := next((file for file in plan.files if file.opens), None)):
        # Executors of clusters write what their tasks need into files.
        raise DataError(
            f"--executor {executor}: the password or signature of {secret.address} would be written into the jobs' files",
            fix="fetch the files first, or use --executor local",
        )
    if notice:
        if reason := why_not(tokenizer.path):
            notice(f"{tokenizer.path}: a model trained with it could be neither exported nor evaluated ({reason})")
        if left_out:
            notice(left_out_line(left_out))
        if empty := empty_line(plan.files):
            notice(empty)
    work = Work(target.with_name(f"{target.name}.partial"), plan)
    try:
        _refuse_overlap(inputs, plan, target)
        _refuse_other_tokenizer(tokenizer, target)
        if not work.folder.exists() and (finished := _finished(target, plan, overwrite)):
            return finished
        with lock(work.folder):
            refuse_running_jobs(work.folder)
            if finished := _finished(target, plan, overwrite):
                shutil.rmtree(work.folder)
                return finished
            work.begin()
            shutil.copyfile(tokenizer.path, work.folder / "tokenizer.model")
            if executor == "slurm":
                return submit_slurm(work, target, cluster or ClusterOptions(), plain)
            if executor == "ray":
                run_ray(work, target, cluster or ClusterOptions(), plain)
            else:
                run_local(work, target, os.cpu_count() or 1 if workers is None else workers, plain, progress)
    except OSError as error:
        raise cannot_write(error, work.folder) from None
    return read_manifest(target)


def _refuse_overlap(inputs: Sequence[str | os.PathLike[str]], plan: Plan, target: Path) -> None:
    """DataError if the store would replace an input, or be one at the next run."""
    ours = {target.with_name(target.name + suffix) for suffix in ("", ".partial")}
    for file in plan.files:
        if file.is_local and not ours.isdisjoint(Path(file.address).resolve().parents):
            raise DataError(f"--output {target} would replace the input {file.address}", fix="give another --output")
    for given in inputs:
        if "://" not in str(given) and Path(given).is_dir() and Path(given).resolve() in target.parents:
            raise DataError(f"--output {target} lies inside the input {given}", fix="give another --output")


def _refuse_other_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    """Training and export find the tokenizer beside the stores that it made: there is one for all stores of a folder."""
    beside = target.with_name("tokenizer.model")
    if beside.exists() and file_sha256(beside) != tokenizer.sha256:
        raise DataError(
            f"{beside} is not {tokenizer.path}, and the stores of a folder share one tokenizer",
            fix="give that one, or an --output in another folder",
        )


def _finished(target: Path, plan: Plan, overwrite: bool) -> Manifest | None:
    """The manifest if `target` is this plan's store, whole; None if it is to be written. DataError if it may not be."""
    if not target.exists():
        return None
    if not (target / "manifest.json").exists():
        if target.is_dir() and not any(target.iterdir()):
            return None
        raise DataError(f"{target} exists and is not a token store", fix="give another --output")
    if overwrite:  # a store that is damaged, but not a checkpoint, which has a manifest.json too
        if not any((target / name).exists() for name in LISTS):
            refuse_foreign(target / "manifest.json", lambda text: has_format(text, FORMAT), "that of a token store")
        return None
    manifest = read_manifest(target)
    asked = read_json(target / "prepared.json")
    if not isinstance(asked, dict) or asked.get("plan") != plan.key:
        raise DataError(f"{target} is a store of other inputs or settings", fix="give another --output, or --overwrite")
    for split in SPLITS:
        TokenStore(target, split).check_sizes()
    return manifest
