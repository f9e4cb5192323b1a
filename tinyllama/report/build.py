"""From paths to the report: reads each run, makes the sections, writes the HTML, the JSON and pictures of their own."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

from tinyllama.data.durable import has_format, refuse_foreign, write_text
from tinyllama.planner.prices import find_device, load_prices
from tinyllama.report import curves, drawing, evaluation, inputs, metrics, page, pareto, serving, summary
from tinyllama.report.picture import Section

FORMAT = "tinyllama-report-1"
IN_THE_TITLE = 3  # runs by name


@dataclasses.dataclass(frozen=True)
class Options:
    """What the reader asked for. quality: a suite or a task; None: the first suite there is."""

    quality: str | None = None
    device: str | None = None
    price_per_hour: float | None = None
    prices: Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The sections, under a title and a sentence."""

    title: str
    lead: str
    created: str
    runs: list[tuple[inputs.Run, dict[str, str]]]
    sections: list[Section]

    def record(self) -> dict[str, Any]:
        """Everything that is plotted or listed, JSON-ready."""
        runs = [
            {
                "name": run.name,
                "training": run.training and str(run.training),
                "evaluations": [str(path) for path in run.evaluations],
                "benches": [str(path) for path in run.benches],
                "summary": facts,
            }
            for run, facts in self.runs
        ]
        sections = [
            {
                "key": section.key,
                "title": section.title,
                "tables": [dataclasses.asdict(table) for table in section.tables],
                "pictures": [picture.record() for picture in section.pictures],
                "left_out": section.left_out,
            }
            for section in self.sections
        ]
        return {"format": FORMAT, "title": self.title, "created_at": self.created, "runs": runs, "sections": sections}


def build(given: list[str], options: Options) -> Report:
    """Read everything. UserError for what cannot be read, and for an unknown quality."""
    runs = inputs.find(given)
    trained = [(run.name, metrics.read(run.training)) for run in runs if run.training]
    by_name = dict(trained)
    results = {run.name: [inputs.read_json(path) for path in run.evaluations] for run in runs}
    benches = {run.name: [serving.read(path) for path in run.benches] for run in runs}
    facts = [(run, summary.facts(by_name.get(run.name), results[run.name], benches[run.name])) for run in runs]
    sections = [summary.section([(run.name, found) for run, found in facts])]
    if trained:
        sections.append(curves.section(trained))
    sections += _scores_and_speed(runs, options, benches, _parameters(by_name, benches))
    title = " and ".join(run.name for run in runs) if len(runs) <= IN_THE_TITLE else f"{len(runs)} runs"
    lead = _lead(runs[0]) if len(runs) == 1 else f"{len(runs)} runs compared."
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Report(title, lead, created, facts, sections)


def _lead(run: inputs.Run) -> str:
    words = {"training": "training", "evaluation": "evaluation", "bench": "serving"}
    held = [word for kind, word in words.items() if kind in run.kinds]
    text = " and ".join([", ".join(held[:-1]), held[-1]]) if len(held) > 1 else held[0]
    return f"{text.capitalize()} of one run."


def _parameters(trained: dict[str, metrics.Training], benches: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The size of each run's model, where a file says it."""
    known = {name: run.config.get("num_parameters") for name, run in trained.items()}
    for name, found in benches.items():
        for bench in found:
            known[name] = known.get(name) or bench["model"].get("num_parameters")
    return {name: float(size) for name, size in known.items() if size}


def _scores_and_speed(
    runs: list[inputs.Run], options: Options, benches: dict[str, list[dict[str, Any]]], params: dict[str, float]
) -> list[Section]:
    """Evaluation, serving, and both together."""
    prices = load_prices(options.prices)
    device = find_device(options.device, prices, "--device") if options.device else None
    evaluated = evaluation.read(runs)
    quality = evaluation.choose_quality(evaluated, options.quality)
    missing = [f"{run.name}: no results.json; score it with tinyllama eval." for run in runs if not run.evaluations]
    if evaluated:
        scores = evaluation.section(evaluated, quality)
        scores.left_out.extend(missing)
    else:
        scores = Section("evaluation", "Evaluation", left_out=missing)
    labelled = [
        (run.name if len(benches[run.name]) == 1 else f"{run.name} {path.parent.name}", bench)
        for run in runs
        for path, bench in zip(run.benches, benches[run.name], strict=True)
    ]
    without = [run.name for run in runs if not run.benches]
    if labelled:
        speed = serving.section(labelled, without)
    else:
        texts = [f"{name}: no bench.json; measure with tinyllama serve." for name in without]
        speed = Section("serving", "Serving", left_out=texts)
    if not evaluated or quality is None:
        text = "Price against quality needs a results.json of tinyllama eval."
        return [scores, speed, Section("price", "Price and quality", left_out=[text])]
    price = pareto.section(quality, evaluated, benches, params, (prices, device, options.price_per_hour))
    return [scores, speed, price]


def _finite(value: Any) -> Any:
    """NaN is not JSON: a number that is not known is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_to_replace(output: Path) -> None:
    """DataError where the HTML file, or the JSON beside it, would replace another file, such as an evaluation's results."""
    marks = ("<!DOCTYPE html>", '<meta name="generator" content="tinyllama ')
    refuse_foreign(output, lambda text: text.startswith(marks[0]) and marks[1] in text[:4096], "a report of ours")
    family = FORMAT.rpartition("-")[0]
    refuse_foreign(output.with_suffix(".json"), lambda text: has_format(text, family), "a report of ours")


def write(report: Report, output: Path) -> list[Path]:
    """The HTML file and the JSON beside it; each appears whole."""
    refuse_to_replace(output)
    beside = output.with_suffix(".json")
    texts = {
        output: page.html(report.title, report.lead, report.sections, report.created),
        beside: json.dumps(_finite(report.record()), allow_nan=False) + "\n",
    }
    for path, text in texts.items():
        write_text(path, [text])
    return list(texts)


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """KEY-light.svg and KEY-dark.svg of each picture."""
    written = []
    for section in report.sections:
        for picture in section.pictures:
            for theme in ("light", "dark"):
                path = folder / f"{picture.key}-{theme}.svg"
                refuse_foreign(path, drawing.is_file, "a picture of ours")
                write_text(path, [drawing.svg(picture, "light" if theme == "light" else "dark")])
                written.append(path)
    return written
