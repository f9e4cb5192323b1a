"""`tinyllama report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A training run, an evaluation, a bench.json, or a folder that holds them; NAME=PATH to name it.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file; its JSON lies beside it.")] = Path(
        "report.html"
    ),
    quality: Annotated[
        str | None,
        typer.Option(metavar="SUITE|TASK", help="What price is weighed against. Default: the first suite there is."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="DOLLARS", help="Of the device that was measured.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of the price table. Default: the one measured, else H100 by arithmetic.")
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="JSON to lay over the price table.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each picture there too, as SVG, light and dark.")
    ] = None,
) -> None:
    """One HTML page about a run, or about several compared: curves, scores, serving, price against quality.

    The page is one file that needs no network. What a run lacks is left out, and the page says so.

    [bold]Examples[/]

      tinyllama report runs/demo

      tinyllama report runs/1b eval/1b bench/1b --output 1b.html

      tinyllama report baseline=runs/a candidate=runs/b --output compared.html

      tinyllama report runs/1b --quality hellaswag --price-per-hour 1.99 --pictures pictures
    """
    from rich.console import Console

    from tinyllama.errors import ConfigError

    if price_per_hour is not None and not 0 < price_per_hour < 1e6:
        raise ConfigError(f"--price-per-hour {price_per_hour:g}", fix="give a positive number of dollars")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {output}", fix="give a name that ends in .html")
    from tinyllama.data.durable import refuse_unwritable

    import_matplotlib()
    refuse_unwritable(output)
    from tinyllama.report import build

    build.refuse_to_replace(output)
    options = build.Options(quality, device, price_per_hour, prices)
    report = build.build(runs, options)
    written = build.write(report, output)
    if pictures:
        written += build.write_pictures(report, pictures)
    console = Console(highlight=False)
    for path in written[:2]:
        console.print(f"written: {path} ({path.stat().st_size / 1e3:,.0f} kB)", soft_wrap=True, markup=False)
    if pictures:
        console.print(f"written: {len(written) - 2} pictures in {pictures}", soft_wrap=True, markup=False)


def import_matplotlib() -> None:
    """MissingExtraError before anything is read."""
    import importlib.util

    from tinyllama.errors import MissingExtraError

    for name in ("matplotlib", "numpy", "orjson"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, "report")
