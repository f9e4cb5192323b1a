"""`tinyllama tokenizer`: train, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command()
def train(
    inputs: Annotated[list[Path], typer.Argument(help="Files or folders: .jsonl[.gz|.zst], .parquet, text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The tokenizer.model to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of pieces; Llama 2 has 32000.")] = 32000,
    max_lines: Annotated[int, typer.Option(help="At most so many lines, sampled, are held in memory.")] = 10_000_000,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a SentencePiece BPE with Llama 2's settings.

    [bold]Examples[/]

      tinyllama tokenizer train corpus/ --output tokenizer.model

      tinyllama tokenizer train prose.jsonl code.parquet --output tokenizer.model --vocab-size 16000
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from tinyllama.data.documents import find_inputs
    from tinyllama.tokenizer.train import train as run

    total = sum(file.path.stat().st_size for file in find_inputs(inputs))
    columns = ("reading", BarColumn(), DownloadColumn(), "ETA", TimeRemainingColumn(), "elapsed", TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        report = run(
            inputs,
            output,
            vocab_size,
            input_sentence_size=max_lines,
            num_threads=threads,
            progress=lambda text_bytes: progress.advance(task, text_bytes),
        )
        progress.update(task, completed=total)
    if as_json:
        print(json.dumps(report))
        return
    Console().print(
        f"[green]trained[/] {report['vocab_size']:,} pieces on {report['documents']:,} documents: {output}",
        highlight=False,
    )


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="tokenizer.model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Hugging Face tokenizer directory to write.")],
    as_json: JsonFlag = False,
) -> None:
    """Write a Hugging Face tokenizer directory whose ids are exactly SentencePiece's, proven before it is written.

    [bold]Example[/]

      tinyllama tokenizer export tokenizer.model --output exports/tokenizer
    """
    import json

    from rich.console import Console

    from tinyllama.tokenizer.export import export_hf

    with Console(stderr=True).status("exporting and proving the ids"):
        report = export_hf(model, output)
    if as_json:
        print(json.dumps(report))
        return
    checked = report["checked"]
    Console().print(
        f"[green]exported[/] {report['vocab_size']:,} pieces to {output}; ids equal SentencePiece's on "
        f"{checked['texts']:,} texts ({checked['tokens']:,} tokens)",
        highlight=False,
    )
