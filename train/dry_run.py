"""`tinyllama train --dry-run`: everything that can be known of a run before it costs anything."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tinyllama import hardware
from tinyllama.errors import ConfigError
from train import before_launch
from train import estimate as estimating
from train import plan as planning
from train.recipe import Recipe
from train.schedule import describe as describe_schedule


def describe(
    recipe: Recipe,
    deepspeed: dict[str, Any],
    data: Path,
    ranks: int,
    device: str,
    mfu: float,
    gigabytes_per_s: float,
    ranks_per_node: int | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """The resolved configurations, the batch, epochs of each source, and the estimate, JSON-ready.

    `epochs` is None, and `data_note` says why, where the stores are not there yet. What the run would refuse is refused.
    """
    limits = hardware.named(device)
    if not 0 < mfu <= 1 or not 0 < gigabytes_per_s < math.inf:
        raise ConfigError(
            f"--mfu {mfu:g}, --gigabytes-per-s {gigabytes_per_s:g}",
            fix="give --mfu above 0, up to 1, and a speed above 0",
        )
    if ranks < 1:
        raise ConfigError(f"--num-accelerators {ranks}", fix="give 1 or more")
    free = int(limits.memory_bytes)
    resolved, batch = planning.resolve_deepspeed(deepspeed, recipe, ranks, ranks_per_node, free)
    epochs, mixture = None, None
    if not (note := planning.missing_store(recipe, data)):
        mixture = before_launch.check_data(recipe, data, tokenizer)
        epochs = mixture.epochs(recipe.num_steps * batch.sequences)
    zero = resolved["zero_optimization"]
    return {
        "recipe": recipe.to_dict(),
        "deepspeed": resolved,
        "batch": {**dataclasses.asdict(batch), "text": str(batch)},
        "memory": planning.describe_memory(resolved, recipe, batch, free),
        "steps": recipe.num_steps,
        "schedule": describe_schedule(recipe),
        "warmup_steps": recipe.warmup_steps,
        "mixture_sha256": mixture.sha256 if mixture else None,
        "epochs": epochs,
        "data_note": note,
        "estimate": estimating.estimate(
            recipe.model,
            tokens=recipe.training.tokens,
            sequence_length=recipe.data.sequence_length,
            micro=batch.micro,
            accumulation=batch.accumulation,
            ranks=ranks,
            stage=zero["stage"],
            checkpointing=recipe.training.activation_checkpointing,
            offload="offload_optimizer" in zero,
            machine_ranks=zero.get("zero_hpz_partition_size", 1),
            compiled=recipe.training.compile is not None,
            reduce_once=batch.reduce_once,
            device=device,
            mfu=mfu,
            gigabytes_per_s=gigabytes_per_s,
        ),
    }


def show(found: dict[str, Any]) -> None:
    """The same for people."""
    console, numbers = Console(highlight=False, soft_wrap=True), found["estimate"]
    console.print(f"{numbers['parameters']:,} parameters, {numbers['tokens']:,} tokens in {found['steps']:,} steps")
    console.print(found["batch"]["text"])
    console.print(found["schedule"], markup=False)
    for note in found.get("notes", []):
        console.print(note, style="yellow", markup=False)
    console.print(found["memory"])
    conventions = ", ".join(f"{value / 1e9:.3f} ({name})" for name, value in numbers["flops_per_token"].items())
    console.print(f"GFLOPs per token: {conventions}; {numbers['total_flops']:.3e} FLOPs in all")
    if found["epochs"] is None:
        console.print(f"[yellow]epochs unknown[/]: {escape(found['data_note'])}")
    else:
        for name, epochs in found["epochs"].items():
            console.print(f"epochs of {escape(name)}: {epochs:.3f}")
    columns = (
        "",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "working",
        "GB a rank",
        "fits",
        "GB sent a step",
        "GB to the host",
        "s a step",
    )
    table = Table(title=f"Memory and traffic of a rank ({numbers['device']})")
    for column in columns:
        table.add_column(column, justify="right")
    for stage, entry in numbers["stages"].items():
        need = entry["memory_bytes"]
        sizes = [need[key] / 1e9 for key in ("weights", "gradients", "optimizer", "activations", "working", "total")]
        chosen = " (chosen)" if stage == numbers["stage"] else ""
        table.add_row(
            f"ZeRO-{stage}{chosen}",
            *(f"{size:.1f}" for size in sizes),
            "yes" if entry["fits"] else "[red]no[/]",
            f"{entry['bytes_per_step'] / 1e9:.1f}",
            f"{entry['bus_bytes_per_step'] / 1e9:.1f}",
            f"{entry['step_s']:.3f}",
        )
    console.print(table)
    console.print(
        f"about {numbers['days']:.2f} days, {numbers['device_hours']:,.0f} {numbers['device']}-hours, at "
        f"{numbers['assumed_mfu']:.0%} MFU and {numbers['assumed_gigabytes_per_s']:g} GB/s a rank, "
        "computing and sending not overlapped; activations are an estimate"
    )
    if text := estimating.advice(numbers):
        console.print(f"[yellow]{text}[/]")
