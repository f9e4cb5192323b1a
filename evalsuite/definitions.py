"""lm-eval task definitions for our benchmarks: overlays in a folder of their own, indexed in milliseconds.

lm-eval's whole index takes about ten seconds to build; the benchmarks of our suites are found by their place in its
package instead, and the index is built only for other tasks. `tag: null` keeps an overlay from emptying lm-eval's tags.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from evalsuite import bundle as bundles
from evalsuite.suites import Benchmark, unknown_task
from tinyllama.errors import UserError

OURS = Path(__file__).parent / "tasks"


@dataclasses.dataclass
class Prepared:
    """A benchmark ready for lm-eval: its leaf tasks, the manager that knows them, and a hash over its data files."""

    benchmark: Benchmark
    leaves: list[str]
    manager: Any
    data_sha256: str | None


def _stock_files(benchmark: Benchmark) -> list[Path]:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    if benchmark.name == "humaneval":
        return [OURS / "humaneval.yaml"]
    return sorted(path for path in root.glob(benchmark.yaml or "") if not path.name.startswith("_"))


def _overlay(stock: Path, folder: Path, changes: dict[str, Any], data: Path | None, scratch: Path) -> tuple[str, str]:
    """Write the overlay of one leaf; returns its task name and the hash of its data files ("" for the hub's)."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(stock, resolve_func=False)
    name = str(config["task"])
    overlay = {"include": str(stock), "task": name, "tag": None, **changes}
    digest = ""
    if data is not None:
        overlay.update(bundles.data_overlay(config, data, scratch))
        digest = bundles.files_sha256(overlay["dataset_kwargs"]["data_files"])
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
    return name, digest


def prepare(benchmark: Benchmark, data: Path | None, scratch: Path) -> Prepared:
    """Overlays for one benchmark. data: a bundle's folder, or None for the hub."""
    from lm_eval.tasks import TaskManager

    if benchmark.yaml is None:
        return _prepare_by_name(benchmark, data, scratch)
    folder = scratch / "tasks" / benchmark.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # BBH's shots are written into its definitions, HumanEval's number is fixed at 0; the others take ours.
    changes = {} if benchmark.name in ("bbh", "humaneval") else {"num_fewshot": benchmark.num_fewshot}
    found = [_overlay(stock, folder, changes, data, scratch) for stock in _stock_files(benchmark)]
    if len(found) != benchmark.leaves:
        raise RuntimeError(f"{benchmark.name}: {len(found)} leaf tasks in this lm-eval, {benchmark.leaves} expected")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    digest = ",".join(d for _, d in found) if data is not None else None
    return Prepared(benchmark, [name for name, _ in found], manager, digest)


def _prepare_by_name(benchmark: Benchmark, data: Path | None, scratch: Path) -> Prepared:
    """Any other lm-eval task: by its name, from lm-eval's whole index."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    name = benchmark.name
    if name not in manager.all_tasks:
        raise unknown_task(name, list(manager.all_tasks))
    if data is None:
        return Prepared(benchmark, [name], manager, None)
    entry = manager._index[name]
    if name in manager.all_groups or entry.yaml_path is None:
        raise UserError(f"task {name!r} is a group", fix="with --data-dir, name its tasks one by one")
    folder = scratch / "tasks" / name
    folder.mkdir(parents=True, exist_ok=True)
    leaf, digest = _overlay(Path(entry.yaml_path), folder, {}, data, scratch)
    return Prepared(benchmark, [leaf], TaskManager(include_path=str(folder), include_defaults=False), digest)
