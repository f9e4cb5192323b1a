"""`tinyllama eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def eval_command(
    model: Annotated[
        str | None,
        typer.Option(help="Export, Hugging Face directory, training checkpoint, or hub id.", show_default=False),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(help="commonsense, problem_solving, all, task names, or a suite of your own (YAML); with commas."),
    ] = "commonsense",
    protocol: Annotated[
        str,
        typer.Option(
            help="Problem solving as lm-eval asks it (harness), or as TinyLlama's numbers were measured (paper)."
        ),
    ] = "harness",
    backend: Annotated[str | None, typer.Option(help="native, hf or vllm; default native for local models.")] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Offline bundle: nothing touches the network. mini: the small one in the package."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many items of each task.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where results.json goes.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows at a time; default as many as the machine takes.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default float32 on a CPU, bfloat16 on a GPU.", show_default=False
        ),
    ] = None,
    contamination: Annotated[
        Path | None,
        typer.Option(help="Report of tinyllama data contamination: adds the scores of the clean items."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Context in tokens; default the model's.")] = None,
    data_parallel: Annotated[
        int | None,
        typer.Option(help="Copies of the model that share the items; default one for each GPU.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep what results.json has of the same model and settings.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace scores of another model or other settings.")
    ] = False,
    parity_check: Annotated[
        bool, typer.Option(help="Compare a converted model with another implementation before its scores count.")
    ] = True,
    samples_per_problem: Annotated[int, typer.Option(help="HumanEval: completions of a problem, for pass@k.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="HumanEval: of its completions; default the protocol's.", show_default=False)
    ] = None,
    rescore: Annotated[
        Path | None,
        typer.Option(help="An evaluation's folder: judge its completions again, without a model.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the tables.")] = False,
) -> None:
    """Score a model through lm-eval and show it beside the published rows.

    results.json is written after each benchmark; run the same command again and finished ones are kept.

    [bold]Examples[/]

      tinyllama eval --model exports/1b --tasks commonsense

      tinyllama eval --model runs/1b/checkpoints/step-00001000 --tasks all --data-dir bundle --output eval/1000

      tinyllama eval --model exports/1b --tasks problem_solving --protocol paper --data-dir bundle

      tinyllama eval --model exports/1b --tasks humaneval --samples-per-problem 10 --temperature 0.6

      tinyllama eval --rescore eval/1b

      tinyllama eval --model TinyLlama/TinyLlama_v1.1 --backend vllm --tasks hellaswag,arc_easy --limit 200
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from evalsuite import backends, bundle
    from tinyllama.errors import UserError
    from tinyllama.processes import guard_from_now_on

    if (model is None) == (rescore is None):
        raise UserError("--model and --rescore: one of them", fix="give a model, or an evaluation's folder")
    if rescore is not None:
        _rescore(rescore, as_json)
        return
    assert model is not None
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}", fix="give 1 or more")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size {batch_size}", fix="give 1 or more")
    offline = data_dir is not None
    if data_dir is not None:
        bundle.find(data_dir)  # before torch is imported
    choice = backends.choose(model, backend, dtype, batch_size, max_length, data_parallel, offline=offline)
    from evalsuite import runner, suites

    chosen, own = suites.choose(tasks, suites.checked_protocol(protocol))
    chosen = suites.sampled(chosen, samples_per_problem, temperature)
    target = output or Path("eval") / (Path(model).name + ("" if protocol == suites.HARNESS else f"-{protocol}"))
    request = runner.Request(
        choice, chosen, data_dir, limit, target, contamination, protocol, tuple(own), resume, parity_check, overwrite
    )
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("[bold]eval"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("preparing", total=len(chosen))
        finished = 0

        def report(name: str, state: str, seconds: float) -> None:
            nonlocal finished
            progress.update(bar, description=name)
            if state == "part":  # of this benchmark, 0 to 1
                progress.update(bar, completed=finished + seconds)
            elif state != "start":
                finished += 1
                progress.update(bar, completed=finished)
                kept = " (kept from before)" if state == "kept" else ""
                progress.console.print(f"{name}: {seconds:.1f} s{kept}", markup=False)

        guard_from_now_on()  # the copies of the model, and who else works for it
        found = runner.evaluate(request, report)
    _show(found, target, as_json)


def _rescore(folder: Path, as_json: bool) -> None:
    from rich.console import Console

    from evalsuite import completions

    with Console(stderr=True).status("judging") as status:
        found = completions.rescore(folder, lambda name: status.update(f"judging {name}"))
    _show(found, folder, as_json)


def _show(found: dict[str, Any], target: Path, as_json: bool) -> None:
    """Print the tables, or results.json, and write table.md."""
    import json

    from rich.console import Console

    from evalsuite import parity, table
    from tinyllama.data.durable import write_text

    write_text(target / "table.md", [table.markdown(found)])
    if as_json:
        print(json.dumps(found, indent=2))
        return
    out = Console(highlight=False)
    table.print_comparison(found, out)
    compared = found.get("parity") or {"compared": True}
    if "positions" in compared or not compared["compared"]:
        out.print(parity.sentence(compared), markup=False)
    out.print(f"results: {target / 'results.json'}, per-item samples: {target / 'samples'}", markup=False)
    out.print(f"in lm-eval's own format: {target / 'lm_eval'}", markup=False)
