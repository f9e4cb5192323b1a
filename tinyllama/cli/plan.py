"""`tinyllama plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyllama import hardware

if TYPE_CHECKING:
    from tinyllama.planner.cost import Costs
    from tinyllama.planner.plan import Goal, Request

# What a count of parameters, tokens or FLOPs may be: anything else is a slip of the keyboard.
PARAMS, TOKENS, FLOPS = (1e4, 1e15), (1e3, 1e20), (1e9, 1e32)


def plan_command(
    loss: Annotated[float | None, typer.Option(help="Goal: this loss, in nats per token.")] = None,
    loss_of: Annotated[
        float | None, typer.Option(metavar="N", help="Goal: the loss of the compute-optimal model of N parameters.")
    ] = None,
    train_flops: Annotated[float | None, typer.Option(help="Goal: the best that this many FLOPs train.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Goal: the best for so many hours of --device.")] = None,
    dollars: Annotated[float | None, typer.Option(help="Goal: the best for so much money.")] = None,
    lifetime: Annotated[bool, typer.Option("--lifetime", help="The budget pays for serving too.")] = False,
    deadline_days: Annotated[
        float | None, typer.Option(help="Train no longer. With --gpus alone, this is the budget.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Devices to train on.")] = None,
    explain: Annotated[
        tuple[float, float] | None, typer.Option(metavar="N D", help="Judge N parameters trained on D tokens.")
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="GPU-hours of published 1B models.")] = False,
    inference_tokens: Annotated[float, typer.Option(metavar="T", help="Tokens served in the model's lifetime.")] = 0.0,
    output_frac: Annotated[
        float | None, typer.Option(help="Share of them that is generated. Default: 0.5, or as in --bench.")
    ] = None,
    unique_tokens: Annotated[float | None, typer.Option(help="Tokens of training data there are.")] = None,
    max_epochs: Annotated[float | None, typer.Option(help="Times each may be seen. Default: 4.")] = None,
    fit: Annotated[str, typer.Option(help="Scaling law, or all: the first of them leads.")] = "all",
    minimise: Annotated[str, typer.Option(help="flops or dollars, of training and serving together.")] = "flops",
    device: Annotated[str, typer.Option(help=f"Trained on: {', '.join(hardware.NAMES)}, or of --prices.")] = "H100",
    inference_device: Annotated[str | None, typer.Option(help="Served on. Default: --device.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Training MFU, counted by 6 N. Default: 0.4.")] = None,
    run: Annotated[Path | None, typer.Option(help="Take the MFU that this run of tinyllama train reached.")] = None,
    bench: Annotated[Path | None, typer.Option(help="Take the tokens per second of this bench.json.")] = None,
    prices: Annotated[Path | None, typer.Option(help="JSON to lay over the price table.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Of the proposed architecture.")] = 32000,
    write_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the proposal as a recipe for tinyllama train.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")] = False,
) -> None:
    """Which model to train, on how many tokens, for a quality or a budget and a lifetime of served tokens; its costs.

    Scaling laws of several authors are asked, and differ: their disagreement is shown. docs/planning.md has the formulas.

    [bold]Examples[/]

      tinyllama plan --loss-of 1.1e9 --inference-tokens 2e12

      tinyllama plan --fit besiroglu --loss-of 1.1e9 --inference-tokens 2e12 --unique-tokens 5e10 --max-epochs 4 --json

      tinyllama plan --gpus 64 --deadline-days 30 --inference-tokens 1e12 --write-recipe recipe.json

      tinyllama plan --dollars 50000 --device A100-40G --run runs/1b --bench bench/1b --prices prices.json

      tinyllama plan --explain 1.1e9 3e12
    """
    from rich.console import Console

    from tinyllama.errors import ConfigError
    from tinyllama.planner import plan as planning
    from tinyllama.planner import table
    from tinyllama.planner.fits import find_fits
    from tinyllama.planner.published import describe as published_runs

    console = Console(highlight=False)
    goals: dict[str, Any] = {"--loss": loss, "--loss-of": loss_of, "--train-flops": train_flops}
    goals |= {"--gpu-hours": gpu_hours, "--dollars": dollars, "--explain": explain, "--published": published or None}
    _check("--deadline-days", deadline_days, (1e-3, 1e5))
    _check("--gpus", gpus, (1, 1e7))
    _check("--inference-tokens", inference_tokens or None, (1, 1e20))
    _check("--vocab-size", vocab_size, (2, 1e7))
    if deadline_days is not None and gpus is not None and all(value is None for value in goals.values()):
        if lifetime:
            raise ConfigError("--lifetime says what a budget pays for, a deadline is none", fix="leave it out")
        # The deadline becomes the budget; it is then met by its own making.
        goals["--gpu-hours"], deadline_days = deadline_days * 24 * gpus, None
    goal = _goal(goals, lifetime)
    if published:
        _print(published_runs(), as_json, table.print_published, console)
        return
    fits = find_fits(fit)
    if minimise not in ("flops", "dollars"):
        raise ConfigError(f"--minimise {minimise}", fix="give flops or dollars")
    request = planning.Request(
        goal=goal,
        costs=_costs(device, inference_device, mfu, run, bench, prices, output_frac),
        demand=inference_tokens,
        data=_data(unique_tokens, max_epochs),
        in_dollars=minimise == "dollars",
        gpus=gpus,
        deadline_days=deadline_days,
    )
    if explain is not None:
        if write_recipe:
            raise ConfigError("--write-recipe with --explain", fix="plan for a goal to have a recipe")
        _check("--explain N", explain[0], PARAMS)
        _check("--explain D", explain[1], TOKENS)
        _print(planning.explain(*explain, request, fits), as_json, table.print_explanation, console)
        return
    result = planning.plan_all(request, fits)
    _add_architecture(result, request, vocab_size, write_recipe)
    _print(result, as_json, table.print_plan, console)
    if write_recipe:
        Console(stderr=True, highlight=False).print(f"written: {write_recipe}", soft_wrap=True, markup=False)


def _print(result: Any, as_json: bool, show: Any, console: Any) -> None:
    import json

    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        show(result, console)


def _check(option: str, value: float | None, within: tuple[float, float]) -> None:
    """ConfigError if a number given is not one that can be meant; not-a-number is outside of any range."""
    from tinyllama.errors import ConfigError

    if value is not None and not within[0] <= value <= within[1]:
        raise ConfigError(f"{option} {value:g}", fix=f"give a number from {within[0]:g} to {within[1]:g}")


def _goal(goals: dict[str, Any], lifetime: bool) -> Goal:
    """The one goal among the options; without any, or with two, ConfigError."""
    from tinyllama.errors import ConfigError
    from tinyllama.planner.plan import Goal

    named = [option for option, value in goals.items() if value is not None]
    if not named:
        raise ConfigError(
            "no goal is given",
            fix=f"give one of {', '.join(goals)}, or --deadline-days with --gpus",
        )
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} contradict each other", fix="give one goal")
    option, value = named[0], goals[named[0]]
    is_budget = option in ("--train-flops", "--gpu-hours", "--dollars")
    if lifetime and not is_budget:
        raise ConfigError(f"--lifetime says what a budget pays for, {option} is none", fix="leave it out")
    if is_budget:
        _check(option, value, FLOPS if option == "--train-flops" else (1e-6, 1e15))
        return Goal(budget=value, unit=option.strip("-").replace("-", "_"), lifetime=lifetime)
    if option == "--loss-of":
        _check(option, value, PARAMS)
        return Goal(loss_of=value)
    if option == "--loss":
        _check(option, value, (1e-6, 10.0))  # guessing among 32,000 tokens has 10.4
        return Goal(loss=value)
    return Goal()


def _data(unique_tokens: float | None, max_epochs: float | None) -> Any:
    from tinyllama.errors import ConfigError
    from tinyllama.planner.repeats import DEFAULT_MAX_EPOCHS, Data

    _check("--unique-tokens", unique_tokens, TOKENS)
    _check("--max-epochs", max_epochs, (1e-3, 1e4))
    if unique_tokens is None and max_epochs is not None:
        raise ConfigError(f"--max-epochs {max_epochs:g} of what?", fix="give --unique-tokens too")
    if unique_tokens is None:
        return Data()
    return Data(unique_tokens, DEFAULT_MAX_EPOCHS if max_epochs is None else max_epochs)


def _costs(
    device: str,
    inference_device: str | None,
    mfu: float | None,
    run: Path | None,
    bench: Path | None,
    prices: Path | None,
    output_frac: float | None,
) -> Costs:
    """Prices and speeds; what was measured comes before what is assumed."""
    from tinyllama.errors import ConfigError
    from tinyllama.planner import cost
    from tinyllama.planner.measured import bench_serving, run_mfu
    from tinyllama.planner.prices import find_device, load_prices

    _check("--mfu", mfu, (1e-6, 1.0))
    _check("--output-frac", output_frac, (0.0, 1.0))
    if mfu is not None and run is not None:
        raise ConfigError("--mfu and --run contradict each other", fix="give one of them")
    if output_frac is not None and bench is not None:
        raise ConfigError(
            "--output-frac and --bench contradict each other", fix="measure with the lengths that you serve"
        )
    table = load_prices(prices)
    train = find_device(device, table, "--device")
    served = find_device(inference_device, table, "--inference-device") if inference_device else train
    measured = bench_serving(bench) if bench else None
    if measured:
        output_frac = measured.output_frac
    if run:
        mfu = run_mfu(run)
    return cost.Costs(
        train,
        served,
        cost.TRAIN_MFU if mfu is None else mfu,
        str(run) if run else None,
        cost.OUTPUT_FRAC if output_frac is None else output_frac,
        measured,
    )


def _add_architecture(result: dict[str, Any], request: Request, vocab_size: int, write_recipe: Path | None) -> None:
    """Add the proposed shape; write it as a recipe where asked. A size that no shape has is an error only then."""
    from tinyllama.errors import ConfigError
    from tinyllama.planner import architecture, learning_rate
    from tinyllama.planner.fits import FITS

    try:
        model = architecture.propose(result["params"], vocab_size)
    except ConfigError as error:
        if write_recipe:
            raise
        result["architecture"] = None
        result["caveats"].append(f"{error}.")
        return
    loss = request.data.loss(FITS[result["fit"]], model.num_parameters, result["tokens"])
    rate = learning_rate.describe(model.num_parameters, result["tokens"])
    shape = {"num_parameters": model.num_parameters, "loss": loss, "model": model.to_dict()}
    result["architecture"] = {**shape, "learning_rate": rate}
    if write_recipe:
        values = architecture.recipe(model, result["tokens"], request.data.max_epochs)
        architecture.write_recipe(values, write_recipe)
