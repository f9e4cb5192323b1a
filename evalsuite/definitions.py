"""lm-eval task definitions for our benchmarks: overlays in a folder of their own, indexed in milliseconds.

lm-eval's whole index takes about ten seconds to build; the benchmarks of our suites are found by their place in its
package instead, and the index is built only for other tasks. `tag: null` keeps an overlay from emptying lm-eval's tags.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from evalsuite import bundle as bundles
from evalsuite import headline, leaves, names, passing, rows, task_config, yaml_files
from evalsuite.suites import HUMANEVAL, PAPER, Benchmark, select, unknown_task
from evalsuite.tasks import paper_prompts
from tinyllama.errors import UserError, nearest

OURS = Path(__file__).parent / "tasks"
Definition = tuple[Path, dict[str, Any]]  # a task's YAML, and what of it is changed


@dataclasses.dataclass
class Prepared:
    """A benchmark ready for lm-eval: its leaf tasks, the manager that knows them, and hashes over its data files and its
    definition. generation: how text is to be generated, of each leaf that has the model write any. own: of leaves with rows
    of the user's own, those rows. runs_programs: whether what the model writes for any of them is executed. loaded:
    lm-eval's task objects, while they are loaded and not yet used. checked: whether their items were.
    """

    benchmark: Benchmark
    leaves: list[str]
    manager: Any
    data_sha256: str | None
    definition_sha256: str
    generation: dict[str, Any]
    own: dict[str, OwnRows] = dataclasses.field(default_factory=dict)
    runs_programs: bool = False
    loaded: Any = None
    checked: bool = False

    @property
    def generates(self) -> bool:
        """Whether the model writes text for any of the leaves."""
        return bool(self.generation)


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """Rows of a user's own task, by split, and what its file says of where they are."""

    tables: dict[str, rows.Rows]
    shown: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An overlay that was written: the task's name, its local data files and their hash ("" for none), its metrics.

    generation: how text is to be generated; None where none is.
    """

    name: str
    files: dict[str, str]
    digest: str
    generation: Any
    metrics: list[str]
    own: OwnRows | None = None
    runs_programs: bool = False


def stock_definitions(benchmark: Benchmark) -> list[Definition]:
    """The definition of each leaf of a benchmark of ours."""
    import lm_eval.tasks

    if benchmark.protocol == PAPER:
        return [(OURS / str(benchmark.yaml), changes) for changes in _paper_leaves(benchmark)]
    if benchmark.own or benchmark.dataset == HUMANEVAL:
        return [(OURS / str(benchmark.yaml), {})]  # of the user's own: an absolute path
    root = Path(lm_eval.tasks.__file__).parent
    return [(p, {}) for p in sorted(root.glob(benchmark.yaml or "")) if not p.name.startswith("_")]


def _paper_leaves(benchmark: Benchmark) -> list[dict[str, Any]]:
    task = benchmark.task
    if task == "tl_mmlu_gen":
        return [
            {"task": f"{task}_{name}", "dataset_name": name, "description": paper_prompts.mmlu_header(name)}
            for name in leaves.MMLU
        ]
    if task == "tl_bbh_direct":
        return [{"task": f"{task}_{name}", "dataset_name": name} for name in leaves.BBH]
    return [{}]


@functools.cache
def _index() -> dict[str, Any]:
    """lm-eval's whole index."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _indexed_definitions(benchmark: Benchmark) -> list[Definition]:
    """Of any other lm-eval task, group or tag, by its name: the definitions of its leaves."""
    found = _members(benchmark.lm_eval_name, {})
    if not found:
        raise UserError(f"lm-eval's {benchmark.lm_eval_name!r} has no tasks", fix="name its tasks one by one")
    return [leaf for number, leaf in enumerate(found) if leaf not in found[:number]]  # one listed twice is asked once


def _members(name: Any, changes: dict[str, Any]) -> list[Definition]:
    if isinstance(name, dict):  # a member with settings of its own: {"task": name, ...} or {"group": name, ...}
        inner = name.get("group") or name.get("task")
        if "group" in name and isinstance(name.get("task"), list):
            return [leaf for member in name["task"] for leaf in _members(member, changes)]
        own = {key: value for key, value in name.items() if key not in ("task", "group", "task_alias", "group_alias")}
        return _members(inner, {**changes, **own})
    entry = _index().get(name)
    if entry is None:
        raise unknown_task(str(name), list(_index()))
    if entry.kind.name == "TAG":
        return [leaf for member in sorted(entry.tags) for leaf in _members(member, changes)]
    if entry.kind.name == "GROUP":
        own = {k: v for k, v in entry.cfg.items() if k not in _group_fields()}
        members = entry.cfg.get("task") or []
        members = [members] if isinstance(members, str) else members
        return [leaf for member in members for leaf in _members(member, {**own, **changes})]
    if entry.yaml_path is None:
        raise UserError(f"lm-eval's task {name!r} has no definition file", fix="leave it out")
    return [(Path(entry.yaml_path), changes)]


def _group_fields() -> set[str]:
    from lm_eval.config.group import GroupConfig

    return {field.name for field in dataclasses.fields(GroupConfig)}


def _as_its_group(benchmark: Benchmark, common: set[str]) -> Benchmark:
    """The benchmark with the headline metric and the mean that its definition as a group has, where the benchmark has none:
    of the group's own metrics the first, acc_norm before acc, by items or by leaves as `weight_by_size` says.
    common: the metrics that all of its tasks have.
    """
    entry = _index().get(benchmark.lm_eval_name) if benchmark.yaml is None else None
    if entry is None or entry.kind.name != "GROUP" or not entry.cfg.get("aggregate_metric_list"):
        return benchmark
    from lm_eval.config.group import GroupConfig

    config = GroupConfig(**{key: value for key, value in entry.cfg.items() if key in _group_fields()})
    listed = {found.metric: found for found in config.aggregate_metric_list or [] if found.metric in common}
    metric = benchmark.metric or (headline.choose("", list(listed)) if listed else "")
    name, _, chosen = metric.partition(",")
    if name not in listed:
        return benchmark
    filters = listed[name].filter_list
    if not chosen and filters:
        metric = f"{name},{filters[0]}"
    mean = benchmark.mean or ("items" if listed[name].weight_by_size else "leaves")
    return dataclasses.replace(benchmark, metric=metric, mean=mean)


def _overlay(
    benchmark: Benchmark, definition: Definition, single: bool, file: Path, data: Path | None, scratch: Path
) -> Leaf:
    """Write the overlay of one leaf: the definition, the benchmark's shots, where the rows are."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    stock, changes = definition
    changes = dict(changes)
    if benchmark.num_fewshot is not None and not benchmark.fixed_shots:
        changes["num_fewshot"] = benchmark.num_fewshot
    if benchmark.own:
        task_config.check({**yaml_files.task(stock)[0], **changes}, str(stock))
    config = {**load_yaml(stock, resolve_func=False), **changes}
    name = str(config["task"])
    if benchmark.variant:
        name = benchmark.name if single else f"{benchmark.name}_{name}"
    runs_programs = task_config.runs_programs(name, config)
    metrics = _check_metric(benchmark, config)
    changes |= _sampling(benchmark, config)
    overlay = {"include": str(stock), **changes, "task": name, "tag": None}
    files: dict[str, str] = {}
    own = None
    if benchmark.own and config.get("dataset_path") in rows.FORMATS:
        own, arrow = _own_rows(stock, config, scratch)
        files = {split: str(table.path) for split, table in own.tables.items()}
        overlay |= {"dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": arrow}
    elif data is not None:
        overlay.update(bundles.data_overlay(config, data, scratch))
        files = overlay["dataset_kwargs"]["data_files"]
    file.write_text(yaml.safe_dump(overlay, sort_keys=False))
    generation = _generation({**config, **changes})
    return Leaf(name, files, bundles.files_sha256(files) if files else "", generation, metrics, own, runs_programs)


def _own_rows(path: Path, config: dict[str, Any], scratch: Path) -> tuple[OwnRows, dict[str, Any]]:
    """The rows of a user's own task, and the dataset_kwargs with which lm-eval reads them as they were read here."""
    kwargs = config["dataset_kwargs"]
    options = {key: value for key, value in kwargs.items() if key != "data_files"}
    named = {split: (path.parent / name).resolve() for split, name in kwargs["data_files"].items()}
    for split, file in named.items():
        yaml_files.refuse_unreadable(file, f"{path}: {split} file ", "paths are relative to the task's file")
    read = {file: rows.read(file, config["dataset_path"], options) for file in dict.fromkeys(named.values())}
    schema = rows.schema_of(list(read.values()))
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=scratch))
    written = {}
    for number, (file, table) in enumerate(read.items()):
        written[file] = str(folder / f"{number}.arrow")
        rows.write(table, schema, Path(written[file]))
    shown = {"dataset_path": config["dataset_path"], "dataset_kwargs": {**options, "data_files": {
        split: str(file) for split, file in named.items()}}}  # fmt: skip
    arrow = {"data_files": {split: written[file] for split, file in named.items()}, "cache_dir": str(folder / "cache")}
    return OwnRows({split: read[file] for split, file in named.items()}, shown), arrow


def _generation(config: dict[str, Any]) -> Any:
    """The generation_kwargs of a task's configuration, with lm-eval's defaults; None for one that generates nothing."""
    if config.get("output_type", "generate_until") != "generate_until":  # lm-eval's default too
        return None
    given = config.get("generation_kwargs") or {}
    if not isinstance(given, dict):
        return given
    return {"until": [config.get("fewshot_delimiter", "\n\n")], **given}


def _sampling(benchmark: Benchmark, config: dict[str, Any]) -> dict[str, Any]:
    """What asks for several completions of a problem, or for another temperature, than the definition does."""
    if benchmark.temperature is None:
        return {}
    drawn = benchmark.temperature > 0
    kwargs = {**config["generation_kwargs"], "do_sample": drawn, "temperature": benchmark.temperature}
    if not drawn:
        del kwargs["temperature"]
    if benchmark.samples == 1:
        return {"generation_kwargs": kwargs}
    take = {"function": "take_first_k", "k": benchmark.samples}
    metrics = [
        {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in passing.ks(benchmark.samples)
    ]
    return {
        "generation_kwargs": kwargs,
        "repeats": benchmark.samples,
        "filter_list": [{"name": "none", "filter": [take]}],
        "metric_list": metrics,
    }


def _check_metric(benchmark: Benchmark, config: dict[str, Any]) -> list[str]:
    """The task's metrics; UserError, before a model is loaded, where the one that is asked for is none of them."""
    known = task_config.metrics_of(config)
    asked = benchmark.metric.partition(",")[0]
    if asked and asked not in known:
        raise UserError(f"task {config['task']!r} has no metric {asked!r}", fix=nearest(asked, known))
    return known


def prepare(benchmark: Benchmark, data: Path | None, scratch: Path) -> Prepared:
    """Overlays for one benchmark. data: a bundle's folder, or None for the hub. scratch: made if it is not there."""
    from lm_eval.tasks import TaskManager

    names.checked(benchmark.name, "task")
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="tasks-", dir=scratch))  # a name is a part of no path here
    definitions = stock_definitions(benchmark) if benchmark.yaml is not None else _indexed_definitions(benchmark)
    if benchmark.leaves is not None and len(definitions) != benchmark.leaves:
        raise UserError(
            f"{benchmark.lm_eval_name}: {len(definitions)} tasks in this lm-eval, {benchmark.leaves} expected",
            fix="check lm-eval's version, or correct leaves",
        )
    single = len(definitions) == 1
    found = [
        _overlay(benchmark, d, single, folder / f"{number:05d}.yaml", data, scratch)
        for number, d in enumerate(definitions)
    ]
    if len({leaf.name for leaf in found}) < len(found):
        raise UserError(f"{benchmark.lm_eval_name} holds a task twice", fix="name its tasks one by one")
    task_config.refuse_mixed(benchmark.lm_eval_name, [(leaf.name, leaf.metrics) for leaf in found])
    benchmark = _as_its_group(benchmark, set.intersection(*(set(leaf.metrics) for leaf in found)))
    benchmark = dataclasses.replace(benchmark, mean=benchmark.mean or "items")
    for leaf in found:
        _refuse_too_few_rows(benchmark, leaf.files)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    digest = ",".join(leaf.digest for leaf in found) if any(leaf.files for leaf in found) else None
    tasks = [leaf.name for leaf in found]
    generation = {leaf.name: leaf.generation for leaf in found if leaf.generation is not None}
    own = {leaf.name: leaf.own for leaf in found if leaf.own}
    definition = _definition_sha256(definitions, benchmark.own)
    runs_programs = benchmark.runs_programs or any(leaf.runs_programs for leaf in found)
    return Prepared(benchmark, tasks, manager, digest, definition, generation, own, runs_programs)


def prepare_for_training(tasks: str, data_dir: str | None, scratch: Path) -> list[Prepared]:
    """Overlays for what a training run is scored on. UserError for what no run can be: also tasks that generate text."""
    data = bundles.find(data_dir, "evaluation.data_dir") if data_dir else None
    prepared = [prepare(benchmark, data, scratch) for benchmark in select(tasks)]
    for task in prepared:
        if task.generates:
            raise UserError(
                f"evaluation.tasks: {task.benchmark.name} generates text",
                fix="evaluate it with tinyllama eval on a checkpoint",
            )
    return prepared


def _definition_sha256(definitions: list[Definition], own: bool = False) -> str:
    """One hash over the YAML files of a benchmark, what they include, the Python beside them, and our changes."""
    digest = hashlib.sha256()
    files = {path for path, _ in definitions}
    included = {p for path in files for p in (yaml_files.task(path)[1][1:] if own else _included(path))}
    folders = {path.parent for path in (files | included if own else files)}
    modules = {p for folder in folders for p in folder.glob("*.py") if p.is_file()}
    if own:
        modules |= {p for path in files for folder in folders for p in yaml_files.modules(path, folder)}
    for path in sorted(files | modules):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted(included):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps([changes for _, changes in definitions], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _included(path: Path) -> list[Path]:
    """The files that a task's YAML is built on, by its `include` key."""
    named = re.search(r"^include:\s*[\"']?([^\"'\s]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if named is None or not (found := path.parent / named.group(1)).is_file():
        return []
    return [found, *_included(found)]


def _refuse_too_few_rows(benchmark: Benchmark, files: dict[str, str]) -> None:
    """UserError, before a model is loaded, where protocol paper takes its shots from the rows that are asked."""
    rules = {
        "tl_bbh_direct": ("test", paper_prompts.bbh_split),
        "tl_drop_prefix": ("validation", paper_prompts.drop_split),
    }
    if benchmark.task not in rules or not files:
        return
    split, rule = rules[benchmark.task]
    if split not in files:
        raise UserError(f"the bundle has no {Path(next(iter(files.values()))).parent / split}.jsonl", fix="complete it")
    try:
        rule(bundles.rows(Path(files[split])))
    except UserError as error:
        raise UserError(f"{files[split]}: {error.what}", fix=error.fix) from None
