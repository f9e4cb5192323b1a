"""The demonstration: every command of the toolkit, one after the other, on text that is always there.

Holds no logic of its own beyond the order of the commands and the memory of which are finished: `steps.json` in the
output directory. A step is done again when its command, or any step before it, changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama.data.durable import refuse_foreign
from tinyllama.errors import DataError, UserError

STOPPED_BY_SIGNAL = 75
# What is measured of serving; the short form goes with a limit on the items of the evaluation.
LOAD = ("--requests", "12")
SHORT = ("--requests", "4", "--rates", "inf", "--concurrency", "4", "--repeats", "2", "--latency-requests", "3")


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and the file that it leaves behind when it is complete."""

    name: str
    title: str
    arguments: tuple[str, ...]
    artefact: Path


def plan(output: Path, tokenizer: Path | None, ranks: int, settings: Sequence[str], limit: int | None) -> list[Step]:
    """The commands of the demo, in order."""
    corpus, data, run = output / "corpus", output / "data", output / "run"
    export, scores, bench = output / "export", output / "eval", output / "serve"
    model = tokenizer or output / "tokenizer.model"
    steps = [
        Step(
            "corpus",
            "Corpus: what CPython ships",
            ("data", "corpus", "--overwrite", "--output", str(corpus)),
            corpus / "code.jsonl",
        )
    ]
    if tokenizer is None:
        learn = ("tokenizer", "train", str(corpus), "--output", str(model), "--vocab-size", str(demo_vocab_size()))
        steps.append(Step("tokenizer", "Tokenizer: SentencePiece BPE with Llama's settings", learn, model))
    for name in ("prose", "code"):
        prepare: tuple[str, ...] = (
            "data",
            "prepare",
            str(corpus / f"{name}.jsonl"),
            "--output",
            str(data / name),
            "--tokenizer",
        )
        extra = ("--validation-fraction", "0.03")
        title = f"Data: {name} into a token store"
        steps.append(Step(f"data-{name}", title, (*prepare, str(model), *extra), data / name / "manifest.json"))
    train: tuple[str, ...] = (
        "train",
        "--recipe",
        "demo",
        "--deepspeed",
        "zero3",
        "--data",
        str(data),
        "--output",
        str(run),
    )
    train += ("--tokenizer", str(model), "--num-accelerators", str(ranks))
    if tokenizer is not None:
        from tinyllama.tokenizer.sentencepiece_model import Tokenizer

        train += ("--set", f"model.vocab_size={Tokenizer.load(tokenizer).vocab_size}")
    for setting in settings:
        train += ("--set", setting)
    steps += [
        Step("train", f"Pretraining: DeepSpeed ZeRO-3 on {ranks} ranks", train, run / "config.json"),
        Step(
            "export",
            "Export: Hugging Face directory, logits and ids checked",
            ("export", str(run), "--output", str(export)),
            export / "tinyllama_export.json",
        ),
        Step(
            "eval",
            "Evaluation: both suites through lm-eval",
            (
                "eval",
                "--model",
                str(export),
                "--tasks",
                "all",
                "--data-dir",
                "mini",
                "--output",
                str(scores),
                "--overwrite",
            )
            + (("--limit", str(limit)) if limit else ()),
            scores / "results.json",
        ),
        Step(
            "serve",
            "Serving: vLLM throughput, and latency under load",
            (
                "serve",
                str(export),
                "--output",
                str(bench),
                "--overwrite",
                "--online-repeats",
                "2",
                *(SHORT if limit else LOAD),
            ),
            bench / "bench.json",
        ),
        Step(
            "report",
            "Report: all of it on one page",
            ("report", str(output), "--output", str(output / "report.html")),
            output / "report.html",
        ),
    ]
    return steps


def demo_vocab_size() -> int:
    """The vocabulary of the demo's recipe, which the tokenizer must match."""
    recipe = importlib.import_module("train.recipe")
    return recipe.load_recipe("demo").model.vocab_size


def _are_steps(text: str) -> bool:
    try:
        return all("seconds" in step for step in json.loads(text).values())
    except (ValueError, RecursionError, TypeError, AttributeError):
        return False


def _read_steps(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def run(output: Path, *, tokenizer: Path | None, ranks: int, settings: Sequence[str], limit: int | None) -> int:
    """Do what is not done yet, then print the tables. Returns the exit code."""
    from rich.console import Console
    from rich.rule import Rule

    console = Console(highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    record_path = output / "steps.json"
    refuse_foreign(record_path, _are_steps, "that of tinyllama demo")
    if not record_path.exists() and any(output.iterdir()):
        raise DataError(f"{output} holds other files", fix="give a new folder as --output")
    if not record_path.exists():
        record_path.write_text("{}\n")
    done, key = _read_steps(record_path), ""
    steps = plan(output, tokenizer, ranks, settings, limit)
    for number, step in enumerate(steps, 1):
        key = hashlib.sha256(f"{key}{step.arguments}".encode()).hexdigest()
        console.print(Rule(f"[bold]{number}/{len(steps)}  {step.title}", align="left"))
        if done.get(step.name, {}).get("key") == key and step.artefact.exists():
            console.print(f"finished before, in {done[step.name]['seconds']:.0f} s: {step.artefact}", markup=False)
            continue
        console.print(f"$ tinyllama {' '.join(step.arguments)}", style="dim", markup=False)
        started = time.monotonic()
        code = _call(step.arguments)
        if code == STOPPED_BY_SIGNAL:
            console.print("[yellow]interrupted[/]; the checkpoint is saved. Run the same command again to continue.")
            return code
        if code:
            console.print(
                f"[red]step {step.name!r} ended with exit code {code}[/]; run the same command again to retry"
            )
            return code
        done[step.name] = {"key": key, "seconds": round(time.monotonic() - started, 1)}
        partial = record_path.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=2) + "\n")
        os.replace(partial, record_path)
    report(output, steps, done, console)
    return 0


def _call(arguments: Sequence[str]) -> int:
    """Run one command of ours in its own process; an interrupt is left for the command to answer."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen([sys.executable, "-m", "tinyllama", *arguments], env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # Ctrl-C reached the command too; it saves and ends


def summary(output: Path) -> dict[str, Any]:
    """What the pretraining of the demo reached, beside the unigram entropy of the same held-out text."""
    from tinyllama.data.inspect import unigram_entropy

    lines = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [entry for entry in lines if "validation" in entry][-1]["validation"]
    steps = [entry for entry in lines if "loss" in entry]
    speeds = sorted(entry["tokens_per_s"] for entry in steps)
    return {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "train_loss": steps[-1]["loss"],
        "tokens_per_s": speeds[len(speeds) // 2],
        "mfu": sorted(entry["mfu"] for entry in steps)[len(steps) // 2],
        "epochs": steps[-1]["epochs"],
        "sources": {
            name: {**result, "unigram_entropy": unigram_entropy(output / "data" / name)}
            for name, result in validation.items()
        },
    }


def report(output: Path, steps: list[Step], done: dict[str, Any], console: Any) -> None:
    """The tables: pretraining, comparison, throughput, and where everything lies; also `summary.json`."""
    from rich.markup import escape
    from rich.table import Table

    found = summary(output)
    (output / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table(title=f"Pretraining: {found['tokens']:,} tokens, median {found['tokens_per_s']:,.0f} tokens/s")
    for heading in ("held-out text", "validation loss", "unigram entropy", "bits per byte", "epochs trained"):
        table.add_column(heading, justify="left" if heading == "held-out text" else "right")
    for name, source in found["sources"].items():
        table.add_row(
            name,
            f"[bold]{source['loss']:.3f}[/]",
            f"{source['unigram_entropy']:.3f}",
            f"{source['bits_per_byte']:.3f}",
            f"{found['epochs'][name]:.2f}",
        )
    console.print(table)

    evaluation, serving = importlib.import_module("evalsuite.table"), importlib.import_module("serve.table")
    evaluation.print_comparison(evaluation.load_results(output / "eval" / "results.json"), console)
    serving.print_bench(serving.load_bench(output / "serve" / "bench.json"), console)

    where = Table(title="Where everything lies", show_header=True)
    for heading in ("step", "seconds", "artefact"):
        where.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    for step in steps:
        if not step.artefact.exists():
            raise UserError(f"{step.artefact} has disappeared", fix="run the demo again")
        where.add_row(step.name, f"{done[step.name]['seconds']:.0f}", escape(str(step.artefact)))
    where.add_row("", f"{sum(done[s.name]['seconds'] for s in steps):.0f}", "in all")
    console.print(where)
