"""`tinyllama export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def export_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="RUN/checkpoints/step-N, or a run: its newest checkpoint. With --quantize also an export or another "
            "Hugging Face Llama directory."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Hugging Face directory to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model, where the checkpoint holds none.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantize: Annotated[
        str | None, typer.Option(metavar="SCHEME", help="int8, fp8, int8-weights or int4-weights; for vLLM.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare the logits with transformers' LlamaForCausalLM.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the export as JSON.")] = False,
) -> None:
    """Write a Hugging Face Llama directory from a training checkpoint, whatever number of ranks wrote it.

    The logits must equal training's and the tokenizer's ids those of the training data, else nothing is written. With
    --quantize, every weight must be within half a quantization step, and the record says how far the logits moved.

    [bold]Examples[/]

      tinyllama export runs/1b --output exports/1b

      tinyllama export runs/1b/checkpoints/step-00001000 --output exports/1b-1000 --dtype float32

      tinyllama export exports/1b --output exports/1b-int8 --quantize int8
    """
    import json

    from rich.console import Console
    from rich.markup import escape

    from tinyllama import locks, model_source
    from tinyllama.errors import ConfigError
    from tinyllama.export import export_checkpoint

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}", fix="give float32, bfloat16 or float16")
    given = model_source.find(checkpoint, local=True)
    given.check(ours=True, tokenizer=not (given.is_checkpoint and tokenizer))  # said before torch is imported
    console = Console(stderr=True)
    lock = locks.held(locks.beside(output), output, "tinyllama export")
    with lock, console.status("exporting") as status:
        if quantize is None:
            record = export_checkpoint(
                checkpoint, output, tokenizer=tokenizer, dtype=dtype, check=check, report=status.update
            )
        else:
            from tinyllama.quantize import export_quantized

            record = export_quantized(
                checkpoint, output, quantize, tokenizer=tokenizer, dtype=dtype, check=check, report=status.update
            )
    if as_json:
        print(json.dumps(record, indent=2))
        return
    out = Console(highlight=False, soft_wrap=True)
    if quantize is not None:
        for line in quantized_lines(record["quantization"], str(output)):
            out.print(line)
        return
    difference = record.get("logits_difference")
    checked = f", logits within {difference:.1e} of transformers" if difference is not None else ""
    out.print(
        f"[green]exported[/] step {record['step']:,} ({record['tokens']:,} tokens) to {escape(str(output))}{checked}",
    )


def quantized_lines(found: dict[str, Any], output: str) -> list[str]:
    """What a user wants to know of a quantized export, in rich markup."""
    from rich.markup import escape

    before, after = found["bytes_before"], found["bytes_after"]
    lines = [
        f"[green]exported[/] {escape(output)}: {found['scheme']}, {found['description']}",
        f"size: {before / 1e6:,.1f} MB in {found['unquantized_dtype']}, {after / 1e6:,.1f} MB quantized "
        f"({100 * after / before:.0f}%); the embedding, the head and the norms stay {found['unquantized_dtype']}",
        f"weights: at most {found['largest_error_steps']:.3f} quantization steps off, of 0.5 that rounding may take",
    ]
    if "logits" in found:
        logits = found["logits"]
        lines.append(
            f"logits on {logits['tokens']:,} tokens of prose: largest difference {logits['max_difference']:.3g}, mean "
            f"{logits['mean_difference']:.3g}, KL divergence {logits['kl_nats']:.3g} nats, same most likely token "
            f"{100 * logits['same_greedy_token']:.1f}%, loss {logits['loss_before']:.4f} to {logits['loss_after']:.4f}"
        )
    return lines
