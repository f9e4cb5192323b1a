"""`tinyllama tokenizer`: train, export.

Arguments, progress and reports; the work is done in `train` and `export`, imported when a command runs, so that
`--help` needs neither sentencepiece nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(rich_markup_mode="rich")
JsonFlag = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command()
def train(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or addresses (s3://, gs://, hf://, https://): .jsonl[.gz|.zst], .parquet, text."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The tokenizer.model to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of pieces; Llama 2 has 32000.")] = 32000,
    max_lines: Annotated[
        int | None, typer.Option(help="At most so many lines, sampled, are held in memory. Default: 10,000,000.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which lines are sampled, where there are more.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a SentencePiece BPE with Llama 2's settings.

    [bold]Examples[/]

      tinyllama tokenizer train corpus/ --output tokenizer.model

      tinyllama tokenizer train prose.jsonl code.parquet --output tokenizer.model --vocab-size 16000

      tinyllama tokenizer train web/ --output tokenizer.model --max-lines 1000000 --seed 1 --json
    """
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from tinyllama import locks
    from tinyllama.data.durable import refuse_existing
    from tinyllama.data.inputs import find_inputs
    from tinyllama.tokenizer.train import INPUT_LINES
    from tinyllama.tokenizer.train import train as run

    refuse_existing(output, overwrite)
    total = sum(file.size_bytes for file in find_inputs(inputs))
    columns = ("{task.description}", BarColumn(), DownloadColumn(), "ETA", TimeRemainingColumn(), TimeElapsedColumn())
    lock = locks.held(locks.beside(output), output, "tinyllama tokenizer train")
    with lock, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=total)
        report = run(
            inputs,
            output,
            vocab_size,
            input_sentence_size=INPUT_LINES if max_lines is None else max_lines,
            seed=seed,
            num_threads=threads,
            progress=lambda text_bytes: progress.advance(task, text_bytes),
            # SentencePiece does not say how far it is: a bar without an end.
            learning=lambda: progress.update(task, description="learning pieces", total=None),
            notice=lambda text: progress.console.print(
                text, style="yellow", markup=False, highlight=False, soft_wrap=True
            ),
            overwrite=overwrite,
        )
        progress.update(task, description="done", total=total, completed=total)
    if as_json:
        print(json.dumps(report))
        return
    Console().print(
        f"[green]trained[/] {report['vocab_size']:,} pieces on {report['lines']:,} lines of "
        f"{report['documents']:,} documents: {escape(str(output))}",
        highlight=False,
        soft_wrap=True,
    )
    for line in _coverage_lines(report):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _coverage_lines(report: dict[str, Any]) -> list[str]:
    """What became of the bytes that were read, and which records were skipped."""
    counts = report["bytes"]
    reasons = (
        ("line_ends", "line ends and empty lines"),
        ("reserved", "of the reserved character U+2585"),
        ("sampled_out", "outside the sample (--max-lines)"),
    )
    left_out = ", ".join(f"{counts[key]:,} {what}" for key, what in reasons if counts[key])
    found = [f"bytes: {counts['read']:,} read, {counts['used']:,} used{f'; left out: {left_out}' if left_out else ''}"]
    if counts["cut_lines"]:
        found.append(
            f"{counts['cut_lines']:,} lines over 65,536 bytes ({counts['cut_lines_bytes']:,} bytes) were cut, at white "
            "space where they have any"
        )
    found += [f"skipped: {count:,} records that are {reason}" for reason, count in report["skipped_records"].items()]
    return found


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="tokenizer.model, or a folder that holds one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Hugging Face tokenizer directory to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tokenizer in it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a Hugging Face tokenizer directory whose ids are exactly SentencePiece's, proven before it is written.

    [bold]Example[/]

      tinyllama tokenizer export tokenizer.model --output exports/tokenizer

      tinyllama tokenizer export data/ --output exports/tokenizer --json
    """
    import json

    from rich.console import Console
    from rich.markup import escape

    from tinyllama.data.durable import refuse_existing
    from tinyllama.tokenizer.export import WRITTEN, export_hf

    for name in WRITTEN:
        refuse_existing(output / name, overwrite)
    with Console(stderr=True).status("exporting and proving the ids"):
        report = export_hf(model, output)
    if as_json:
        print(json.dumps(report))
        return
    checked = report["checked"]
    Console().print(
        f"[green]exported[/] {report['vocab_size']:,} pieces to {escape(str(output))}; ids equal SentencePiece's on "
        f"{checked['texts']:,} texts ({checked['tokens']:,} tokens)",
        highlight=False,
        soft_wrap=True,
    )
