"""What a GPU day found, as a file to keep and as a page to read.

    python benchmarks/gpu_report.py FOLDER

FOLDER: what came back from `benchmarks/gpu_day.sh run`. Writes benchmarks/results/gpu_<card>.json with every row, and the
part of docs/gpu.md between its two markers, from all such files. Rows of a CPU are refused there: `--output FILE` keeps
them elsewhere, without any figure that is a GPU's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_day import rows  # noqa: E402
from gpu_day.conduct import ROWS  # noqa: E402
from record import RESULTS  # noqa: E402

from tinyllama.hardware import training_peak  # noqa: E402

DOCS = HERE.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class ReportError(Exception):
    """What keeps a report from being made, in one line."""


def newest(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each name, in the order of the stages: a stage may have been run again."""
    last = {(entry["stage"], entry["row"]): entry for entry in found}
    return sorted(last.values(), key=lambda entry: entry["stage"])


def read_day(folder: Path) -> dict[str, Any]:
    """The content of the file that is kept: machine, and every row that ended, with MFU where a GPU's peak is known."""
    found = rows.finished(rows.read(folder / ROWS))
    if not found:
        raise ReportError(f"{folder / ROWS} has no rows")
    machine = next((e for e in reversed(found) if e["row"] == "versions" and e["status"] == rows.OK), None)
    if machine is None:
        raise ReportError(f"{folder / ROWS} does not say on which machine it was measured (stage 0, row versions)")
    about = machine["values"]
    kept = newest(found)
    peak, source = training_peak(about["card"]) if about["card"] else (math.nan, "a CPU has no data sheet here")
    for entry in kept:
        rate = (entry.get("values") or {}).get("flops_per_s")
        if rate and math.isfinite(peak):
            entry["values"]["mfu"] = rate / peak
    pack = json.loads(about["pack"]) if about.get("pack") else {}
    return {
        "benchmark": "gpu_day",
        "device": about["device"],
        "card": about["card"],
        "driver": about.get("driver"),
        "date": machine["at"][:10],
        "commit": pack.get("commit", "unknown"),
        "shape": about["shape"],
        "versions": about["versions"],
        "machine": {k: v for k, v in about.items() if k not in ("versions", "pack", "status")},
        "peak_flops": peak if math.isfinite(peak) else None,
        "peak_flops_source": source,
        "rows": kept,
    }


def file_name(card: str) -> str:
    """`NVIDIA H100 80GB HBM3` is gpu_h100_80gb_hbm3.json."""
    words = [word for word in re.findall(r"[a-z0-9]+", card.lower()) if word != "nvidia"]
    return f"gpu_{'_'.join(words)}.json"


# -- The page -----------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    if not lines:
        return []
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*head, *("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines), ""]


def _good(day: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Rows that ended well and have this figure."""
    return [e for e in day["rows"] if e["status"] == rows.OK and key in (e.get("values") or {})]


def step_lines(day: dict[str, Any]) -> list[str]:
    """Tokens a second, MFU and memory of everything that trains the 1.1B model."""
    ceiling = next((e["values"]["flops"] for e in _good(day, "best_flops")), None)
    lines = []
    for entry in _good(day, "flops_per_s"):
        found = entry["values"]
        mfu = f"{found['mfu']:.1%}" if "mfu" in found else "-"
        of_matmul = f"{found['flops_per_s'] / ceiling:.1%}" if ceiling else "-"
        rate = [f"{found['tokens_per_s']:,.0f}", f"{found['flops_per_s'] / 1e12:.4g}"]
        lines.append([entry["row"], *rate, mfu, of_matmul, f"{found['peak_bytes'] / 2**30:.1f}"])
    model = "1.1B, 2,048 tokens" if day["shape"] == "full" else f"a model of {day['shape']} shape"
    return _table([model, "tokens/s", "TFLOP/s", "MFU", "of the matmul", "peak GiB"], lines)


def share_lines(day: dict[str, Any]) -> list[str]:
    """Of one micro-step's kernels."""
    lines = [
        [kind, f"{share:.1%}", f"{share * entry['values']['device_ms'] * 1000 / entry['values']['tokens']:.2f}"]
        for entry in _good(day, "shares")
        for kind, share in entry["values"]["shares"].items()
    ]
    return _table(["kernels of a micro-step", "share", "µs a token"], lines)


def figure_lines(day: dict[str, Any]) -> list[str]:
    """All other rows that ended well, in their own words."""
    shown = {id(entry) for key in ("flops_per_s", "shares") for entry in _good(day, key)}
    lines = [
        [str(entry["stage"]), entry["row"], entry["figure"]]
        for entry in day["rows"]
        if entry["status"] == rows.OK and entry.get("figure") and id(entry) not in shown
    ]
    return _table(["stage", "row", "figure"], lines)


def failure_lines(day: dict[str, Any]) -> list[str]:
    """What failed or was skipped, and why."""
    lines = []
    for entry in day["rows"]:
        if entry["status"] == rows.FAILED:
            why = entry.get("figure") or rows.last_line(entry.get("error") or "")
            lines.append([str(entry["stage"]), entry["row"], f"failed: {why[:200]}"])
        elif entry["status"] == rows.SKIPPED and not entry["part"].endswith("tests"):  # counted in one line
            lines.append([str(entry["stage"]), entry["row"], f"skipped: {entry.get('reason', '')[:200]}"])
    return _table(["stage", "not measured", "why"], lines)


def tests_line(day: dict[str, Any]) -> list[str]:
    """How many tests passed."""
    found = [entry for entry in day["rows"] if entry["part"].endswith("tests")]
    counts = {
        status: sum(entry["status"] == status for entry in found) for status in (rows.OK, rows.FAILED, rows.SKIPPED)
    }
    passed = f"{counts[rows.OK]} passed, {counts[rows.FAILED]} failed, {counts[rows.SKIPPED]} skipped"
    return [f"`pytest -m gpu`: {passed}.", ""] if found else []


def page(day: dict[str, Any]) -> list[str]:
    """The section of one card."""
    versions = ", ".join(f"{name} {text}" for name, text in day["versions"].items() if text and name != "system")
    title = day["card"] or f"CPU, {day['shape']} shapes: no figures of a GPU"
    lines = [f"### {title}", "", f"{day['date']}, commit {day['commit']}, driver {day['driver']}; {versions}."]
    if day["peak_flops"]:
        lines.append(f"MFU is of {day['peak_flops'] / 1e12:.0f} TFLOP/s, {day['peak_flops_source']}.")
    lines.append("")
    for part in (step_lines, share_lines, figure_lines, tests_line, failure_lines):
        lines += part(day)
    return lines


def update_docs(docs: Path, results: Path) -> None:
    """Replace what is between the markers by the sections of all cards."""
    text = docs.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{docs} lacks the lines {BEGIN} and {END}")
    days = [json.loads(path.read_text()) for path in sorted(results.glob("gpu_*.json"))]
    lines = [
        line for day in days if day.get("benchmark") == "gpu_day" and day["device"] == "cuda" for line in page(day)
    ]
    docs.write_text(f"{before}{BEGIN}\n" + "\n".join(lines).rstrip() + f"\n{END}{after}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of rows.jsonl")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/gpu_<card>.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="page with the two markers (default docs/gpu.md)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    try:
        day = read_day(given.folder)
        if day["device"] != "cuda" and given.output is None:
            raise ReportError(
                f"{given.folder} was measured on a CPU: give --output to keep it, not as figures of a GPU"
            )
        if day["shape"] != "full" and given.output is None:
            raise ReportError(f"{given.folder} was measured with {day['shape']} shapes: give --output to keep it")
        path = given.output or given.results / file_name(day["card"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(day, indent=1) + "\n")
        print("\n".join(page(day)))
        print(path)
        if given.output is None:
            update_docs(given.docs, given.results)
            print(given.docs)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
