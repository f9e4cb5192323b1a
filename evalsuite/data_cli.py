"""`tinyllama eval-data`: bundles of the suites' data sets, for evaluations that touch no network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode="rich")
SHOWN = 20  # problems, a line each


@app.command()
def pull(
    output: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    mirror: Annotated[
        Path | None, typer.Option(help="A folder with the hub's repositories as owner/name, in place of the hub.")
    ] = None,
) -> None:
    """Fetch every data set of the suites from the Hugging Face hub. Run it again: finished splits are kept.

    [bold]Examples[/]

      tinyllama eval-data pull bundle

      tinyllama eval-data pull bundle --mirror /mnt/hub/datasets
    """
    from evalsuite import packing
    from tinyllama import locks

    with locks.held(locks.beside(output), output, "tinyllama eval-data pull"), _console().status("fetching") as status:
        files = packing.pull(output, mirror, lambda text: status.update(text))
    rows = sum(file.rows for file in files.values())
    _console().print(f"{output}: {len(files)} files, {rows:,} rows; tinyllama eval --data-dir {output}", markup=False)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A folder of <data set>/<config>/<split>.jsonl or .parquet.")],
    output: Annotated[Path, typer.Argument(help="A new folder, or one file: .tar.zst or .tar.gz.")],
) -> None:
    """Make a verified bundle with a manifest from local files.

    [bold]Examples[/]

      tinyllama eval-data pack downloads bundle

      tinyllama eval-data pack bundle bundle.tar.zst
    """
    from evalsuite import packing
    from tinyllama import locks

    with locks.held(locks.beside(output), output, "tinyllama eval-data pack"), _console().status("packing") as status:
        packing.pack(source, output, lambda text: status.update(text))
    _console().print(f"{output} is packed and verified", markup=False)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle: a folder, or a .tar.zst or .tar.gz file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check a bundle's files, sums, rows, the columns that tasks read, and the numbers of MMLU's and BBH's tasks.

    Exit code 2 with a line for each file that is missing or corrupt.

    [bold]Examples[/]

      tinyllama eval-data verify bundle

      tinyllama eval-data verify bundle.tar.zst --json
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from evalsuite import data_sets, manifest, packing
    from tinyllama.cli.app import print_error
    from tinyllama.errors import UserError

    if not bundle.exists():
        raise UserError(f"{bundle} is not there", fix="give a bundle's folder or archive")
    with packing.unpacked(bundle) as folder:
        findings = manifest.verify(folder)
        listed = manifest.read(folder) is not None
    if as_json:
        print(packing.as_json(findings))
    else:
        table = Table(title=escape(f"{bundle}, {'by its manifest' if listed else 'which has no manifest: no sums'}"))
        for heading in ("data set", "tasks", "files", "rows", "MB", "problems"):
            table.add_column(heading, justify="left" if heading == "data set" else "right")
        for found in findings:
            tasks = str(found.configs) if found.expected is None else f"{found.configs} of {found.expected}"
            numbers = (f"{found.files:,}", f"{found.rows:,}", f"{found.bytes / 1e6:.1f}", str(len(found.problems)))
            table.add_row(escape(found.data_set), tasks, *numbers, style="red" if found.problems else None)
        absent = [d.hub for d in data_sets.DATA_SETS if d.hub not in {found.data_set for found in findings}]
        Console(highlight=False).print(table)
        if absent:
            Console(highlight=False).print(f"not in this bundle: {', '.join(absent)}", markup=False)
    problems = [problem for found in findings for problem in found.problems]
    for problem in problems[:SHOWN]:
        print_error(problem)
    if len(problems) > SHOWN:
        print_error(f"and {len(problems) - SHOWN:,} more")
    if problems:
        raise typer.Exit(2)


def _console():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console(stderr=True, highlight=False)
