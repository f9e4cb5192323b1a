"""`tinyllama export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step-N, or a run: its newest checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Hugging Face directory to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model, where the checkpoint holds none.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    check: Annotated[bool, typer.Option(help="Compare the logits with transformers' LlamaForCausalLM.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the export as JSON.")] = False,
) -> None:
    """Write a Hugging Face Llama directory from a training checkpoint, whatever number of ranks wrote it.

    The logits must equal training's and the tokenizer's ids those of the training data, else nothing is written.

    [bold]Examples[/]

      tinyllama export runs/1b --output exports/1b

      tinyllama export runs/1b/checkpoints/step-00001000 --output exports/1b-1000 --dtype float32
    """
    import json

    from rich.console import Console
    from rich.markup import escape

    from tinyllama.errors import ConfigError
    from tinyllama.export import export_checkpoint

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}", fix="give float32, bfloat16 or float16")
    console = Console(stderr=True)
    with console.status("exporting") as status:
        record = export_checkpoint(
            checkpoint, output, tokenizer=tokenizer, dtype=dtype, check=check, report=status.update
        )
    if as_json:
        print(json.dumps(record, indent=2))
        return
    difference = record.get("logits_difference")
    checked = f", logits within {difference:.1e} of transformers" if difference is not None else ""
    Console().print(
        f"[green]exported[/] step {record['step']:,} ({record['tokens']:,} tokens) to {escape(str(output))}{checked}",
        highlight=False,
        soft_wrap=True,
    )
