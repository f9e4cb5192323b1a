"""Plans as tables on the console."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """Three digits and a unit: 315M, 2.54T; a dash for nothing."""
    if value is None:
        return "-"
    for size, unit in UNITS:
        # 999.7M would round to 1000M.
        if value >= size * 0.9995:
            shown = value / size
            return f"{shown:,.0f}{unit}" if shown >= 99.95 else f"{shown:.3g}{unit}"
    return f"{value:.3g}"


def dollars(value: float) -> str:
    return f"${count(value)}" if value >= 1e6 else f"${value:,.0f}" if value >= 100 else f"${value:.3g}"


def print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings, the first column on the left."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", markup=False)
    console.print(table)


def print_fits(
    console: Console, title: str, entries: Sequence[dict[str, Any]], rows: Sequence[tuple[str, Callable[..., str]]]
) -> None:
    """A column for each fit, so that five of them go on 80 characters; a row for each number."""
    names = [entry["fit"].replace("_", "_\n") for entry in entries]
    print_table(console, title, ["", *names], [[label, *(show(entry) for entry in entries)] for label, show in rows])


def print_plan(result: dict[str, Any], console: Console) -> None:
    """Every fit's plan and costs, then what they rest on."""
    in_dollars = result["assumptions"]["minimised"] == "dollars"
    good = [p for p in result["fits"].values() if "error" not in p]
    print_fits(
        console,
        f"The cheapest model to train and to serve {count(result['inference_tokens'])} tokens with",
        good,
        [
            ("loss", lambda p: f"{p['loss']:.4f}"),
            ("parameters", lambda p: count(p["params"])),
            ("tokens", lambda p: count(p["tokens"])),
            ("tokens/parameter", lambda p: f"{p['tokens_per_param']:,.0f}"),
            ("epochs", lambda p: f"{p['epochs']:.2f}"),
            ("training FLOPs", lambda p: f"{p['train_flops']:.3g}"),
            ("inference FLOPs", lambda p: f"{p['inference_flops']:.3g}"),
            ("training GPU-h", lambda p: f"{p['train_gpu_hours']:,.0f}"),
            ("serving GPU-h", lambda p: f"{p['inference_gpu_hours']:,.0f}"),
            ("training", lambda p: dollars(p["train_dollars"])),
            ("serving", lambda p: dollars(p["inference_dollars"])),
            ("  1M tokens", lambda p: dollars(p["dollars_per_million_tokens"])),
        ],
    )
    print_fits(
        console,
        "Against the model of the same loss that is cheapest to train",
        good,
        [
            ("its parameters", lambda p: count(p["reference"]["params"])),
            ("its tokens", lambda p: count(p["reference"]["tokens"])),
            ("total FLOPs", lambda p: f"{p['total_flops']:.3g}"),
            ("  its", lambda p: f"{p['reference']['total_flops']:.3g}"),
            ("  saved", lambda p: f"{p['saved_frac']:.1%}"),
            ("total cost", lambda p: dollars(p["total_dollars"])),
            ("  its", lambda p: dollars(p["reference"]["total_dollars"])),
            ("  saved", lambda p: f"{p['saved_dollars_frac']:.1%}"),
            (f"pays off ({'$' if in_dollars else 'FLOPs'})", lambda p: count(p["break_even_demand"])),
        ],
    )
    for entry in result["fits"].values():
        if "error" in entry:
            console.print(f"{entry['fit']}: {entry['error']}", style="yellow", markup=False)
    if result["train_days"] is not None:
        console.print(f"On {result['gpus']:,} GPUs, training takes {result['train_days']:,.2f} days ({result['fit']}).")
    print_architecture(result, console)
    print_notes(result, console)


def print_architecture(result: dict[str, Any], console: Console) -> None:
    """The shape proposed, if there is one."""
    if proposal := result["architecture"]:
        model = proposal["model"]
        console.print(
            f"A Llama of that size ({result['fit']}): {proposal['num_parameters']:,} parameters, "
            f"{model['num_hidden_layers']} layers of {model['hidden_size']}, FFN {model['intermediate_size']}, "
            f"{model['num_attention_heads']} heads on {model['num_key_value_heads']} key/value heads, "
            f"vocabulary {model['vocab_size']:,}; loss {proposal['loss']:.4f} after these tokens.",
            markup=False,
        )
        console.print(f"Its {proposal['learning_rate']['text']}.", markup=False)


def print_notes(result: dict[str, Any], console: Console) -> None:
    """Assumptions and caveats."""
    basis = result["assumptions"]
    device, inference = basis["device"], basis["inference_device"]
    console.print(
        f"Basis: {device['name']} at ${device['dollars_per_hour']:g}/h, training MFU {basis['train_mfu']:.3g} by 6 N "
        f"({basis['train_mfu_source'] or 'assumed'}); "
        f"served on {inference['name']} at ${inference['dollars_per_hour']:g}/h, {basis['serving']}, "
        f"{basis['output_frac']:.0%} of the tokens generated.",
        style="dim",
        markup=False,
    )
    for text in result["caveats"]:
        console.print(f"• {text}", style="dim", markup=False)
    for name, entry in result["fits"].items():
        for text in entry.get("warnings", ()):
            console.print(f"• {name}: {text}", style="dim", markup=False)


def print_explanation(result: dict[str, Any], console: Console) -> None:
    """One given model."""
    console.print(
        f"{count(result['params'])} parameters on {count(result['tokens'])} tokens: "
        f"{result['tokens_per_param']:,.0f} tokens per parameter, {result['train_flops']:.4g} FLOPs, "
        f"{result['train_gpu_hours']:,.0f} GPU-hours, {dollars(result['train_dollars'])}.",
        markup=False,
    )
    if result["assumptions"]["unique_tokens"]:
        console.print(
            f"{result['epochs']:.2f} epochs: worth {count(result['effective_tokens'])} unique tokens, "
            f"{result['effective_tokens'] / result['tokens']:.2%} of them."
        )
    print_fits(
        console,
        "Under each fit",
        [{"fit": name, **entry} for name, entry in result["fits"].items()],
        [
            ("loss", lambda p: f"{p['loss']:.4f}"),
            ("optimal tokens", lambda p: count(p["optimal_tokens_for_params"])),
            ("same FLOPs: N", lambda p: count(p["same_flops"]["params"])),
            ("  D", lambda p: count(p["same_flops"]["tokens"])),
            ("  loss", lambda p: f"{p['same_flops']['loss']:.4f}"),
            ("same loss: N", lambda p: count(p["same_loss"]["params"])),
            ("  D", lambda p: count(p["same_loss"]["tokens"])),
            ("  FLOPs", lambda p: f"{p['same_loss']['train_flops']:.3g}"),
            ("paid", lambda p: f"{p['train_flops_ratio']:.3g}x"),
            ("pays off after", lambda p: count(p["break_even_demand"])),
            ("cheapest at", lambda p: count(p["optimal_at_demand"])),
        ],
    )
    console.print(
        "optimal tokens: compute-optimal for these parameters. same FLOPs: the best that its training FLOPs buy. same loss: "
        "the cheapest to train; paid: its training FLOPs over those. pays off after: served tokens from which it costs less "
        "than that model, all told. cheapest at: the demand for which no model of its loss costs less.",
        style="dim",
    )
    print_notes(result, console)


def print_published(result: dict[str, Any], console: Console) -> None:
    """GPU-hours of published runs."""
    runs = result["runs"]
    rows = [
        (r["name"], f"{r['tokens_per_s']:,.0f}", f"{r['gpu_hours']:,.0f}", f"{r['readme_gpu_hours']:,}") for r in runs
    ]
    title = f"GPU-hours for {count(result['compared_tokens'])} tokens on {result['device']}"
    print_table(console, title, ["", "tokens/s per GPU", "GPU-hours", "TinyLlama's README"], rows)
    for run in runs:
        console.print(f"• {run['name']}: {run['source']}", style="dim", markup=False)
