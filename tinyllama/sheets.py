"""Tables in the forms that commands offer, on the terminal or in a file. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "markdown", "csv", "json", "latex")
WIDTH = 160  # of tables in a file
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {"±": r"$\pm$", "≤": r"$\le$", "−": "--", "–": "--"}


class Sheet(NamedTuple):
    """One table: a title of one or two lines, headings, rows, the notes under it, and how many columns are text."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]
    text_columns: int = 1


class Comparison(NamedTuple):
    """What a comparison has to show, whatever was compared.

    print_tables: on a console. text: in one of FORMATS but "table". failure: the line for what dropped too far, if anything
    did.
    """

    print_tables: Callable[[Console], None]
    text: Callable[[str], str]
    failure: str | None

    def show(self, form: str, output: Path | None) -> None:
        """Print it in one of FORMATS, or write it. DataError if it cannot be written."""
        import io

        from rich.console import Console

        from tinyllama.data.durable import refuse_foreign, write_text

        if form == "table":
            stream = io.StringIO()  # a file has no width of its own
            self.print_tables(
                Console(highlight=False, file=stream, width=WIDTH) if output else Console(highlight=False)
            )
            shown = stream.getvalue()
        else:
            shown = self.text(form)
        if output:
            refuse_foreign(output, lambda old: _alike(old, shown), "an earlier version of this comparison")
            write_text(output, [shown])
        else:
            print(shown, end="")


def _alike(old: str, new: str) -> bool:
    """Whether two texts are comparisons in one form: by the title or the headings, or by the format of JSON."""
    import json

    from tinyllama.data.durable import has_format

    if new.startswith("{"):
        return has_format(old, json.loads(new)["format"].rpartition("-")[0])
    first, second = (text.lstrip("\ufeff\n").partition("\n")[0].strip() for text in (old, new))
    return first == second


def print_sheets(sheets: Sequence[Sheet], console: Console) -> None:
    """Tables on the console, each with its notes."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    for sheet in sheets:
        table = Table(title=escape(sheet.title))
        for index, heading in enumerate(sheet.headings):
            left = index < sheet.text_columns
            table.add_column(heading, justify="left" if left else "right", no_wrap=left)
        for row in sheet.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for note in sheet.notes:
            console.print(Text(note), style="dim")


def markdown(sheets: Sequence[Sheet]) -> str:
    """Every table as Markdown."""
    parts = []
    for sheet in sheets:
        alignment = [" :-- |" if i < sheet.text_columns else " --: |" for i in range(len(sheet.headings))]
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (sheet.headings, *sheet.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        table = "\n".join([lines[0], f"|{''.join(alignment)}", *lines[1:]])
        parts += [f"## {sheet.title.replace(chr(10), ', ')}", table, *sheet.notes]
    return "\n\n".join(parts) + "\n"


def latex(sheets: Sequence[Sheet]) -> str:
    """Every table as LaTeX, without any package."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(character, character) for character in text)

    parts = []
    for sheet in sheets:
        columns = "l" * sheet.text_columns + "r" * (len(sheet.headings) - sheet.text_columns)
        lines = [" & ".join(escaped(cell) for cell in row) + r" \\" for row in (sheet.headings, *sheet.rows)]
        notes = [rf"\par {escaped(note)}" for note in sheet.notes]
        title = sheet.title.replace("\n", ", ")
        parts += [
            f"% {title}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline",
            r"\end{tabular}", *notes, "",
        ]  # fmt: skip
    return "\n".join(parts)
