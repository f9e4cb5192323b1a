"""`tinyllama compare`: looks what kind of results it was given, and hands them to the package that wrote them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import typer

from tinyllama.errors import UserError, nearest


def compare_command(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULT...",
            help="results.json or bench.json, or its folder; published:NAME for a published row of scores.",
        ),
    ],
    form: Annotated[str, typer.Option("--format", help="table, markdown, csv, json or latex.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it there.")] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Checkpoints of one run: in order of tokens, with each score's course.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the scores with their intervals too.")
    ] = None,
    fail_if_drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TASK=]POINTS",
            help="Exit 1 if a score is lower than the first's by more than so many points (of benches: a throughput by more "
            "than so many percent), and significantly. Repeatable.",
        ),
    ] = None,
) -> None:
    """Compare evaluations, or benches: each difference from the first, tested.

    Scores are tested on the same items; throughputs and latencies over their repeats, where both measured alike.

    [bold]Examples[/]

      tinyllama compare eval/1000 eval/2000 "published:TinyLlama-1.1B 3T"

      tinyllama compare runs/1b/eval/* --curve --format markdown --output curve.md

      tinyllama compare eval/a eval/b "published:Pythia-1.0B" --plot scores.svg

      tinyllama compare eval/released eval/candidate --fail-if-drop 1 --fail-if-drop boolq=2.5

      tinyllama compare bench/released bench/candidate --fail-if-drop 5
    """
    from tinyllama.cli.app import print_error
    from tinyllama.sheets import FORMATS, Comparison

    compared = kind(results)
    if form not in FORMATS:
        raise UserError(f"--format {form}", fix=nearest(form, list(FORMATS)))
    if compared == "bench":
        for option, given in (("--curve", curve), ("--plot", plot)):
            if given:
                raise UserError(f"{option} is about scores", fix="leave it out for benches")
        found: Comparison = importlib.import_module("serve.compare_cli").compare_benches(results, fail_if_drop)
    else:
        found = importlib.import_module("evalsuite.compare_cli").compare_scores(results, curve, plot, fail_if_drop)
    found.show(form, output)
    if found.failure:
        print_error(found.failure)
        raise typer.Exit(1)


def kind(results: list[str]) -> str:
    """ "bench" or "scores", what all of them are; UserError if they are not the same. What cannot be read is left to those
    who read it.
    """
    for name in results:
        if not name.startswith("published:"):
            _refuse_no_result(name)
    found = {name: _kinds(name) for name in results}
    common = set.intersection(*found.values())
    if not common:
        bench = next(name for name, kinds in found.items() if kinds == {"bench"})
        scores = next(name for name, kinds in found.items() if kinds == {"scores"})
        raise UserError(
            f"{scores} holds scores and {bench} a bench: they cannot be compared", fix="compare those of one kind"
        )
    if common == {"bench", "scores"} and any((Path(name) / "bench.json").exists() for name in results):
        raise UserError(
            f"{results[0]} holds results.json and bench.json", fix="name the file that is meant, not its folder"
        )
    return "bench" if common == {"bench"} else "scores"


def _refuse_no_result(name: str) -> None:
    """UserError for a path that does not exist, with the nearest that does; for a model, which has no scores by itself."""
    from tinyllama import model_source

    path = Path(name)
    try:
        if not path.exists():
            raise model_source.missing(name, name, "give results.json, bench.json, or the folder of one")
        if not path.is_dir() or (path / "results.json").exists() or (path / "bench.json").exists():
            return
        model_source.find(name, local=True)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror})", fix="give a result that you may read") from None
    except UserError:
        if not path.exists():
            raise
        raise UserError(
            f"{name} holds neither results.json nor bench.json", fix="give the folder of an evaluation or a bench"
        ) from None
    raise UserError(
        f"{name} is a model, and no result",
        fix=f"measure it first: tinyllama eval --model {name}, or tinyllama serve {name}",
    )


def _kinds(name: str) -> set[str]:
    """What a result could be: both where a folder holds both, or nothing tells."""
    path = Path(name)
    if name.startswith("published:"):
        return {"scores"}
    if path.is_dir():
        names = {"bench.json": "bench", "results.json": "scores"}
        return {kind for file, kind in names.items() if (path / file).exists()} or {"bench", "scores"}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {"bench"} if path.name == "bench.json" else {"bench", "scores"}
    return {"bench"} if isinstance(content, dict) and "-bench-" in str(content.get("format")) else {"scores"}
