"""`tinyllama data`: prepare, verify, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command()
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Files or folders: .jsonl[.gz|.zst], .parquet, text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The token store to write.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.model.")],
    validation_fraction: Annotated[float, typer.Option(help="Share of documents held out, by their text.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Decides which documents are held out.")] = 1337,
    threads: Annotated[int | None, typer.Option(help="Tokenizer threads; default all cores.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Tokenize documents into a store. Finished input files are kept: run it again after an interruption.

    [bold]Examples[/]

      tinyllama data prepare slimpajama/train --output data/slimpajama --tokenizer tokenizer.model

      tinyllama data prepare a.jsonl b.parquet --output data/mine --tokenizer tokenizer.model --validation-fraction 0.02
    """
    import json
    import shutil

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from tinyllama.data.documents import find_inputs
    from tinyllama.data.prepare import prepare as run
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    total = sum(f.path.stat().st_size for f in find_inputs(inputs))
    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), "ETA", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        manifest = run(
            inputs,
            output,
            loaded,
            validation_fraction=validation_fraction,
            seed=seed,
            threads=threads,
            progress=lambda text_bytes, _: progress.advance(task, text_bytes),
        )
        progress.update(task, completed=total)
    beside = output.parent / "tokenizer.model"
    if not beside.exists():
        # Training and export find the tokenizer beside the stores that it made.
        shutil.copyfile(loaded.path, beside)
    _print_summary(output, manifest, json.dumps if as_json else None)


@app.command()
def corpus(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for prose.jsonl and code.jsonl.")],
    as_json: JsonFlag = False,
) -> None:
    """Write the prose and the code that CPython ships: a corpus that is always there, with no network.

    [bold]Example[/]

      tinyllama data corpus --output corpus
    """
    import json

    from rich.console import Console

    from tinyllama.data.corpus import write

    with Console(stderr=True).status("reading the standard library"):
        counts = write(output)
    if as_json:
        print(json.dumps(counts))
        return
    for name, count in counts.items():
        Console().print(
            f"{output / name}.jsonl: {count['documents']:,} documents, {count['bytes']:,} bytes", highlight=False
        )


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

    from tinyllama.data.store import verify as run

    with Console(stderr=True).status(f"reading {store}"):
        manifest = run(store)
    if not as_json:
        Console().print(f"[green]intact[/]: every checksum, boundary and separator of {store} holds")
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
    from rich.table import Table

    from tinyllama.data.inspect import describe

    path = tokenizer or store.parent / "tokenizer.model"
    found = describe(store, path if path.exists() else None, samples)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = Console()
    table = Table(title=f"Documents of {store} by length (training split)")
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
    for sample in found["samples"]:
        console.rule(f"document {sample['document']} of {sample['shard']}, {sample['tokens']:,} tokens")
        console.print(sample["text"], markup=False, highlight=False)


def _print_summary(store: Path, manifest, dumps) -> None:
    """The counts of a store, as a line for each split or as JSON."""
    from rich.console import Console

    splits = {
        split: {"tokens": manifest.tokens(split), "documents": manifest.documents(split)}
        for split in ("train", "validation")
    }
    if dumps:
        print(
            dumps({"store": str(store), "sha256": manifest.sha256, "splits": splits, "skipped": len(manifest.skipped)})
        )
        return
    for split, counts in splits.items():
        Console().print(f"{split}: {counts['tokens']:,} tokens in {counts['documents']:,} documents", highlight=False)
    if manifest.skipped:
        Console().print(f"skipped: {len(manifest.skipped):,} documents, reasons in {store}/manifest.json")
