"""Finds what there is to report: training runs, evaluations and benchmarks, in the paths that were given.

A path is one of these, or a folder that holds them a few levels down, such as the demo's. A folder with several training
runs is several runs. Nothing is interpreted here beyond which file is what.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tinyllama.errors import UserError

METRICS, RESULTS, BENCH = "metrics.jsonl", "results.json", "bench.json"
FORMATS = {"tinyllama-results": "evaluation", "tinyllama-bench": "bench"}
SKIPPED = {"checkpoints", "samples", "lm_eval", "heartbeats", "stacks", "corpus"}
LEVELS = 4
FIX = "give a run of tinyllama train, an evaluation, a bench.json, or a folder that holds them"


@dataclasses.dataclass(frozen=True)
class Run:
    """What belongs together under one name. training: a run directory. evaluations, benches: JSON files."""

    name: str
    path: Path
    training: Path | None
    evaluations: list[Path]
    benches: list[Path]

    @property
    def kinds(self) -> set[str]:
        """What it holds."""
        held = {"training": self.training, "evaluation": self.evaluations, "bench": self.benches}
        return {kind for kind, what in held.items() if what}


def find(given: list[str]) -> list[Run]:
    """The runs of `PATH` and `NAME=PATH` arguments, each with a name of its own. UserError for a path that holds none."""
    runs: list[Run] = []
    named = set()
    for text in given:
        name, path = _split(text)
        if name:
            named.add(name)
        runs += _runs(path, name)
    seen: dict[Path, str] = {}
    for run in runs:
        place = run.path.resolve()
        if place in seen:
            raise UserError(f"{run.path} is given twice", fix="give each run once")
        seen[place] = run.name
    return _distinct(_merged(runs, named))


def _merged(runs: list[Run], given: set[str]) -> list[Run]:
    """Runs of one name become one, if that name was given or if each holds what the others lack: runs/1b and eval/1b."""
    found: list[Run] = []
    for run in runs:
        place = next((i for i, other in enumerate(found) if other.name == run.name), None)
        if place is None:
            found.append(run)
            continue
        other = found[place]
        if run.training and other.training and run.name in given:
            raise UserError(f"{run.name} is the name of two training runs", fix="give each of them another name")
        if run.name in given or not (run.kinds & other.kinds):
            found[place] = dataclasses.replace(
                other,
                training=other.training or run.training,
                evaluations=other.evaluations + run.evaluations,
                benches=other.benches + run.benches,
            )
        else:
            found.append(run)
    return found


def _split(text: str) -> tuple[str | None, Path]:
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        if not name or not path:
            raise UserError(f"{text!r} is not NAME=PATH", fix="such as baseline=runs/1b")
        return name, Path(path)
    return None, Path(text)


def _runs(path: Path, name: str | None) -> list[Run]:
    if not path.exists():
        raise UserError(f"{path} does not exist", fix=FIX)
    if path.is_file():
        return [_file(path, name)]
    found = _collect(path, LEVELS)
    if not any(found.values()):
        raise UserError(f"{path} holds no {METRICS}, {RESULTS} or {BENCH}, {LEVELS} levels down", fix=FIX)
    trainings = found["training"]
    if len(trainings) <= 1:
        training = trainings[0] if trainings else None
        return [Run(name or _name(path), path, training, found["evaluation"], found["bench"])]
    if name:
        raise UserError(f"{name}={path} holds {len(trainings)} training runs", fix="give each of them a name")
    children = sorted(child for child in path.iterdir() if child.is_dir() and child.name not in SKIPPED)
    if path in trainings:  # a run that holds others: its own files are a run too
        alone = [place for place in (*found["evaluation"], *found["bench"]) if place.parent == path]
        first = [Run(_name(path), path, path, [p for p in alone if p.name == RESULTS], [])]
    else:
        first = []
    held = [child for child in children if any(_collect(child, LEVELS - 1).values())]
    return first + [run for child in held for run in _runs(child, None)]


def _file(path: Path, name: str | None) -> Run:
    if path.name == METRICS:
        return Run(name or _name(path.parent), path, path.parent, [], [])
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path} is no {METRICS}, {RESULTS} or {BENCH} of tinyllama", fix=FIX)
    own = path.parent if path.name in (RESULTS, BENCH) else path.with_suffix("")
    found = {"evaluation": [path] if kind == "evaluation" else [], "bench": [path] if kind == "bench" else []}
    return Run(name or _name(own), path, None, found["evaluation"], found["bench"])


def kind_of(path: Path) -> str | None:
    """What a JSON file says that it is."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    form = str(content.get("format", "")) if isinstance(content, dict) else ""
    return next((kind for start, kind in FORMATS.items() if form.startswith(start)), None)


def _collect(folder: Path, levels: int) -> dict[str, list[Path]]:
    """The run directories and files in a folder, in order of their names."""
    found: dict[str, list[Path]] = {"training": [], "evaluation": [], "bench": []}
    if (folder / METRICS).is_file():
        found["training"].append(folder)
    for name, kind in ((RESULTS, "evaluation"), (BENCH, "bench")):
        if (folder / name).is_file():
            if kind_of(folder / name) != kind:
                raise UserError(f"{folder / name} is not what tinyllama writes", fix="make it again, or move it away")
            found[kind].append(folder / name)
    if levels:
        try:
            children = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"{folder} cannot be read ({error.strerror})", fix=FIX) from None
        for child in children:
            if child.is_dir() and not child.is_symlink() and child.name not in SKIPPED and child.name[0] != ".":
                for kind, places in _collect(child, levels - 1).items():
                    found[kind] += places
    return found


def _name(folder: Path) -> str:
    return folder.resolve().name or "run"


def _distinct(runs: list[Run]) -> list[Run]:
    """Names that are given to several runs get the folder above in front, or a number."""
    counts = Counter(run.name for run in runs)
    named = [
        dataclasses.replace(run, name=f"{run.path.resolve().parent.name}/{run.name}") if counts[run.name] > 1 else run
        for run in runs
    ]
    counts, seen, final = Counter(run.name for run in named), Counter[str](), []
    for run in named:
        seen[run.name] += 1
        again = counts[run.name] > 1
        final.append(dataclasses.replace(run, name=f"{run.name} ({seen[run.name]})") if again else run)
    return final


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
