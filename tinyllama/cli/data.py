"""`tinyllama data`: prepare, verify, inspect, contamination."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyllama.data.defaults import (
    MAX_DOCUMENT_BYTES,
    SEED,
    SHARD_TOKENS,
    TASK_MEMORY_GB,
    TASK_TIME,
    TASKS,
    VALIDATION_FRACTION,
)

app = typer.Typer(rich_markup_mode="rich")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command()
def prepare(
    output: Annotated[Path, typer.Option("--output", "-o", help="The token store to write.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.model.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders or addresses (s3://, gs://, hf://, https://): .jsonl[.gz|.zst], .parquet, text."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Rules of a known data set: slimpajama, starcoder. Its address, if no INPUTS.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of the text; default text, then content.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="field=value: leave such documents out. Repeatable; meta.x for nested.")
    ] = None,
    bad_records: Annotated[str, typer.Option(help="refuse (one error) or skip (listed in the store).")] = "refuse",
    max_document_bytes: Annotated[int, typer.Option(help="Longer texts are skipped, and listed.")] = MAX_DOCUMENT_BYTES,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents held out, by their text.")
    ] = VALIDATION_FRACTION,
    seed: Annotated[int, typer.Option(help="Decides which documents are held out.")] = SEED,
    workers: Annotated[int | None, typer.Option(help="Processes, or tasks at a time; default all.")] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in each shard.")] = SHARD_TOKENS,
    executor: Annotated[str, typer.Option(help="local, slurm or ray.")] = "local",
    tasks: Annotated[int, typer.Option(help="Slurm, Ray: into how many tasks the work is divided.")] = TASKS,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    time: Annotated[str, typer.Option(help="Slurm: limit for a task.")] = TASK_TIME,
    memory_gb: Annotated[int, typer.Option(help="Slurm, Ray: memory of a task.")] = TASK_MEMORY_GB,
    sbatch: Annotated[list[str] | None, typer.Option(help="Slurm: key=value for sbatch. Repeatable.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="SentencePiece without the cache of words: slower.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store of other inputs.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Tokenize documents into a store. Run it again after an interruption: finished input files are kept.

    [bold]Examples[/]

      tinyllama data prepare web/ --output data/web --tokenizer tokenizer.model

      tinyllama data prepare --preset slimpajama SlimPajama-627B/train --output data/slimpajama --tokenizer tokenizer.model

      tinyllama data prepare --preset starcoder s3://bucket/starcoderdata --output data/starcoder --tokenizer tokenizer.model

      tinyllama data prepare a.jsonl --exclude meta.set=code --output data/a --tokenizer tokenizer.model --json

      tinyllama data prepare web/ --output data/web --tokenizer tokenizer.model --executor slurm --partition cpu
    """
    import json

    from tinyllama.data.documents import Rules, read_preset
    from tinyllama.data.executors import ClusterOptions
    from tinyllama.data.prepare import prepare as run
    from tinyllama.errors import ConfigError
    from tinyllama.processes import guard_from_now_on
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer

    known = read_preset(preset)
    if bad_records not in ("refuse", "skip"):
        raise ConfigError(f"--bad-records {bad_records}", fix="give refuse or skip")
    excluded = dict(known.exclude)
    for setting in exclude or ():
        field, equals, value = setting.partition("=")
        if not field or not equals:
            raise ConfigError(f"--exclude {setting}", fix="write --exclude field=value")
        excluded[field] = (*excluded.get(field, ()), value)
    rules = Rules(
        text_field or known.text_field or None, tuple(excluded.items()), bad_records == "skip", max_document_bytes
    )
    addresses = inputs or ([known.address] if known.address else [])
    loaded = Tokenizer.load(tokenizer)
    if executor == "local":  # jobs of a cluster outlive this command, on this machine too
        guard_from_now_on()  # workers that are importing still notice its end only later
    with _PrepareProgress() as progress:
        result = run(
            addresses,
            output,
            loaded,
            rules=rules,
            suffixes=known.suffixes,
            validation_fraction=validation_fraction,
            seed=seed,
            workers=workers,
            executor=executor,
            cluster=ClusterOptions(tasks, workers, partition, time, memory_gb, tuple(sbatch or ())),
            shard_tokens=shard_tokens,
            plain=plain,
            overwrite=overwrite,
            progress=progress.update,
            notice=progress.notice,
        )
    if isinstance(result, list):
        _print_jobs(output, result, json.dumps if as_json else None)
        return
    _print_summary(output, result, json.dumps if as_json else None)


class _PrepareProgress:
    """The progress bar of `prepare`: bytes read of all, documents, tokens, MB of text a second, ETA."""

    def __init__(self) -> None:
        import time

        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            "ETA",
            TimeRemainingColumn(),
            TextColumn("{task.fields[counts]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.clock = time.monotonic
        self.started = self.clock()
        self.task = self.progress.add_task("looking", total=None, counts="")

    def __enter__(self) -> _PrepareProgress:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)  # type: ignore[arg-type]

    def notice(self, text: str) -> None:
        self.progress.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def update(self, totals: Any) -> None:
        speed = totals.text_bytes / max(1e-9, self.clock() - self.started) / 1e6
        counts = (
            f"{totals.files:,}/{totals.total_files:,} files, {totals.documents:,} documents, {totals.tokens:,} tokens"
        )
        if totals.stage == "tokenize":
            counts += f", {speed:.1f} MB/s"
        self.progress.update(self.task, description=totals.stage, completed=totals.read_bytes, total=totals.total_bytes)
        if totals.tokens:
            self.progress.update(self.task, counts=counts)


def _print_jobs(output: Path, jobs: list[str], dumps: Any) -> None:
    if dumps:
        print(dumps({"store": str(output), "slurm_jobs": jobs}))
        return
    from rich.console import Console

    Console().print(
        f"submitted Slurm jobs {', '.join(jobs)}, each after the one before; logs in {output}.logs. When the last one is "
        f"done, {output} is there: check it with tinyllama data verify {output}. If one failed, run this again.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def corpus(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for prose.jsonl and code.jsonl.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the prose and the code that CPython ships: a corpus that is always there, with no network.

    [bold]Example[/]

      tinyllama data corpus --output corpus
    """
    import json

    from rich.console import Console

    from tinyllama.data.corpus import write
    from tinyllama.data.durable import refuse_existing

    for name in ("prose.jsonl", "code.jsonl"):
        refuse_existing(output / name, overwrite)
    with Console(stderr=True).status("reading the standard library"):
        counts = write(output)
    if as_json:
        print(json.dumps(counts))
        return
    for name, count in counts.items():
        line = f"{output / name}.jsonl: {count['documents']:,} documents, {count['bytes']:,} bytes"
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    as_json: JsonFlag = False,
) -> None:
    """Read every byte of a store and compare it with its manifest; names the first bad file.

    [bold]Example[/]

      tinyllama data verify data/slimpajama
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from tinyllama.data.store import read_manifest
    from tinyllama.data.store import verify as run

    found = read_manifest(store)
    total = 2 * (1 + (found.dtype == "<u4")) * sum(found.tokens(split) for split in found.splits)
    columns = ("reading", BarColumn(), DownloadColumn(), TransferSpeedColumn(), "ETA", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        manifest = run(store, progress=lambda num_bytes: progress.advance(task, num_bytes))
    if not as_json:
        Console().print(
            f"intact: every checksum, boundary and separator of {store} holds",
            style="green",
            markup=False,
            soft_wrap=True,
        )
    _print_summary(store, manifest, json.dumps if as_json else None)


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model; default: the one beside the store.")] = None,
    samples: Annotated[int, typer.Option(help="How many documents to decode.")] = 3,
    as_json: JsonFlag = False,
) -> None:
    """Counts, lengths of documents, and decoded samples.

    [bold]Example[/]

      tinyllama data inspect data/slimpajama --samples 5
    """
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tinyllama.data.inspect import describe

    found = describe(store, tokenizer, samples)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = Console()
    table = Table(title=escape(f"Documents of {store} by length (training split)"))
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    most = max((row["documents"] for row in found["lengths"]), default=1)
    for row in found["lengths"]:
        bar = "█" * max(1, round(40 * row["documents"] / most))
        table.add_row(f"{row['from']:,} to {row['to']:,}", f"{row['documents']:,}", bar)
    console.print(table)
    for split, counts in found["splits"].items():
        console.print(f"{split}: {counts['tokens']:,} tokens, {counts['documents']:,} documents", highlight=False)
    console.print(f"separator {found['separator_id']}: {found['separators']:,} in the training split", highlight=False)
    for name, entry in found["special_tokens"].items():
        run = f", longest run {entry['longest_run']}" if "longest_run" in entry else f" ({entry['ids']} pieces)"
        console.print(f"{name}: {entry['count']:,} in the training split{run}", highlight=False)
    for sample in found["samples"]:
        console.rule(f"document {sample['document']:,}, {sample['tokens']:,} tokens")
        console.print(sample["text"], markup=False, highlight=False)


@app.command()
def contamination(
    stores: Annotated[list[Path], typer.Argument(help="Token stores that a model was, or will be, trained on.")],
    against: Annotated[str, typer.Option(help="A bundle of benchmarks: a folder, or mini.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The report, as JSON.")] = Path("contamination.json"),
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model; default: the one beside the store.")] = None,
    ngram: Annotated[int, typer.Option(help="Tokens in a row that count as overlap.")] = 13,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Which benchmark items share a run of 13 tokens with the training data. Clean subsets are scored with the report.

    [bold]Examples[/]

      tinyllama data contamination data/slimpajama data/starcoder --against eval-bundle --output contamination.json

      tinyllama data contamination data/prose --against mini --json
    """
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table

    from tinyllama.data.contamination import report
    from tinyllama.data.durable import cannot_write, refuse_existing, refuse_unwritable, write_json
    from tinyllama.data.store import read_manifest
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer

    refuse_existing(output, overwrite)
    total = sum(read_manifest(store).tokens("train") for store in stores)
    loaded = Tokenizer.load(tokenizer or stores[0].parent / "tokenizer.model")
    columns = ("scanning", BarColumn(), MofNCompleteColumn(), "tokens, ETA", TimeRemainingColumn())
    refuse_unwritable(output)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        found = report(
            stores,
            _bundle(against),
            loaded,
            ngram=ngram,
            threads=threads,
            progress=lambda tokens: progress.advance(task, tokens),
        )
    try:
        write_json(output, found)
    except OSError as error:
        raise cannot_write(error, output) from None
    if as_json:
        print(json.dumps({key: value for key, value in found.items() if key != "items"}))
        return
    table = Table(title=escape(f"Items that share {ngram} tokens in a row with {', '.join(map(str, stores))}"))
    table.add_column("set")
    for column in ("items", "overlap", "of which 80%", "clean", "too short"):
        table.add_column(column, justify="right")
    for entry in found["sets"]:
        counts = [entry[key] for key in ("items", "overlap", "overlap_80", "clean", "short")]
        table.add_row(escape(entry["set"]), *(f"{count:,}" for count in counts))
    console = Console()
    console.print(table)
    console.print(
        f"{found['found_ngrams']:,} of {found['distinct_ngrams']:,} distinct {ngram}-grams found: {output}",
        markup=False,
        soft_wrap=True,
    )


def _bundle(name: str) -> Path:
    """The folder of a bundle; `mini` is the one that ships with the evaluation package."""
    import importlib.util

    if name == "mini" and (spec := importlib.util.find_spec("evalsuite")) and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "bundles" / "mini"
    return Path(name)


def _print_summary(store: Path, manifest, dumps) -> None:
    """The counts of a store, as a line for each split or as JSON."""
    from rich.console import Console

    splits = {
        split: {"tokens": counts.tokens, "documents": counts.documents, "bytes_of_text": counts.bytes_of_text}
        for split, counts in manifest.splits.items()
    }
    if dumps:
        print(dumps({"store": str(store), "sha256": manifest.sha256, "splits": splits, "inputs": manifest.inputs}))
        return
    console = Console()
    for split, counts in splits.items():
        console.print(f"{split}: {counts['tokens']:,} tokens in {counts['documents']:,} documents", highlight=False)
    for reason, count in manifest.inputs["excluded"].items():
        console.print(f"excluded: {count:,} documents with {reason}", highlight=False, markup=False, soft_wrap=True)
    if manifest.inputs["skipped"]:
        listed = f"skipped: {manifest.inputs['skipped']:,} records, each with its reason in {store}/skipped.jsonl"
        console.print(listed, style="yellow", highlight=False, markup=False, soft_wrap=True)
