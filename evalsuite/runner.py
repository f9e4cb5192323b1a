"""Evaluates benchmark after benchmark and writes `results.json` after each, so that nothing finished is ever lost.

A benchmark that is in the file already, with the same model content, settings, data and versions, is not done again. The
per-item samples lie beside it in `samples/`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalsuite import (
    backends,
    bundle,
    contamination,
    earlier_results,
    generation_settings,
    headline,
    samples,
    suites,
    task_loading,
)
from evalsuite.aggregate import suite_means
from evalsuite.answer_checks import of_scoring
from evalsuite.earlier_results import FORMAT, what_decides
from evalsuite.files import write_json, write_json_lines
from evalsuite.item_checks import reason
from evalsuite.lm_eval_format import BOOTSTRAP_ITERS, FEWSHOT_SEED, ResultsFile
from evalsuite.suites import Benchmark
from tinyllama import locks, scratch
from tinyllama.data.durable import refuse_foreign, refuse_unwritable
from tinyllama.errors import UserError, nearest
from tinyllama.export import TALKATIVE
from tinyllama.units import lower_is_better

TEMPLATES = 1024  # of prompts, kept compiled
NAMES = ("tinyllama", "lm_eval", "torch", "transformers", "datasets")


@dataclasses.dataclass(frozen=True)
class Request:
    """One evaluation: a model, benchmarks, and where the data come from and the results go."""

    choice: backends.ModelChoice
    benchmarks: list[Benchmark]
    data_dir: str | None
    limit: int | None
    output: Path
    contamination: Path | None = None
    protocol: str = suites.HARNESS
    own_suites: tuple[suites.Suite, ...] = ()
    resume: bool = True
    parity_check: bool = True
    overwrite: bool = False


def versions() -> dict[str, str]:
    """Versions of what decides a score."""
    return {name: importlib.metadata.version(name) for name in NAMES}


def combine(values: list[float], stderrs: list[float | None], sizes: list[int]) -> tuple[float, float | None]:
    """Mean over all items of several leaf tasks, and its standard error, by lm-eval's pooled variance.

    values, stderrs, sizes: per leaf. The error is None where a leaf has too few items for one.
    """
    total = sum(sizes)
    value = sum(v * n for v, n in zip(values, sizes, strict=True)) / total
    if total == len(sizes) > 1:  # one item in each leaf: the leaves' values are the items
        return value, math.sqrt(sum((v - value) ** 2 for v in values) / (total - 1) / total)
    if any(s is None or not math.isfinite(s) for s in stderrs) or total == len(sizes):
        return value, None
    if len(sizes) == 1:
        return value, stderrs[0]
    pooled = sum((n - 1) * s**2 * n for s, n in zip(stderrs, sizes, strict=True) if s is not None)
    return value, math.sqrt(pooled / (total - len(sizes)) / total)


def combine_leaves(values: list[float], stderrs: list[float | None]) -> tuple[float, float | None]:
    """Unweighted mean of leaf tasks, and its standard error; None where a leaf has none."""
    known = [s for s in stderrs if s is not None and math.isfinite(s)]
    stderr = math.hypot(*known) / len(values) if len(known) == len(values) else None
    return math.fsum(values) / len(values), stderr


def _common_metrics(results: dict[str, Any], leaves: list[str]) -> list[str]:
    """The metrics that every leaf has, in order; UserError where there is none."""
    parts = [{k.split(",")[0] for k in results["results"][leaf] if "," in k and "_stderr" not in k} for leaf in leaves]
    first = dict.fromkeys(key.split(",")[0] for key in results["results"][leaves[0]])
    if not (found := [name for name in first if all(name in part for part in parts)]):
        raise UserError(f"{', '.join(leaves[:4])}: no metric in common", fix="name the tasks one by one")
    return found


def score(benchmark: Benchmark, results: dict[str, Any], leaves: list[str]) -> dict[str, Any]:
    """Headline metric of a benchmark from lm-eval's results of its leaves."""
    found: dict[str, dict[str, Any]] = {}
    names = _common_metrics(results, leaves)
    config = (results.get("configs") or {}).get(leaves[0], {})
    chosen = headline.choose(benchmark.metric, headline.in_order(config, names))
    per_leaf = {}
    for leaf in leaves:
        entry, size = results["results"][leaf], results["n-samples"][leaf]["effective"]
        key = next((k for k in entry if "," in k and chosen in (k, k.split(",")[0])), None)
        if key is None:
            raise UserError(f"task {leaf} has no {chosen}", fix="name a metric of the task's own, or correct it")
        metric, filter_name = key.split(",", 1)
        if not math.isfinite(entry[key]):
            raise UserError(f"{leaf}: its {metric} is {entry[key]}", fix="check the model's weights")
        stderr = entry.get(f"{metric}_stderr,{filter_name}")
        per_leaf[leaf] = {
            "value": float(entry[key]),
            "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
            "n": int(size),
        }
        found[leaf] = {"key": key, "higher_is_better": _higher_is_better(results, leaf, metric)}
    values, stderrs, sizes = (list(column) for column in zip(
        *((p["value"], p["stderr"], p["n"]) for p in per_leaf.values()), strict=True))  # fmt: skip
    macro = benchmark.mean == "leaves" and max(sizes) > 1
    value, stderr = combine_leaves(values, stderrs) if macro else combine(values, stderrs, sizes)
    first = leaves[0]
    others = {
        k: float(v)
        for k, v in results["results"][first].items()
        if len(leaves) == 1 and "," in k and isinstance(v, int | float) and "_stderr" not in k
    }
    return {
        "metric": chosen.partition(",")[0],
        "metric_key": found[first]["key"],
        "value": value,
        "stderr": stderr,
        "n": sum(p["n"] for p in per_leaf.values()),
        "num_fewshot": int(results["n-shot"][first]),
        "higher_is_better": found[first]["higher_is_better"],
        "protocol": benchmark.protocol,
        "task": benchmark.export_name,
        "mean": benchmark.mean,
        "task_version": results["versions"].get(first),
        "metrics": others,
        "generation": config.get("generation_kwargs"),
        "leaves": per_leaf if len(leaves) > 1 else {},
        "note": benchmark.note,
    }


def _refuse_unknown_cluster(benchmark: Benchmark, tasks: dict[str, Any]) -> None:
    """UserError, before a model is loaded, where a task's items do not have the field that is to make clusters of them."""
    for name, leaf in tasks.items():
        known = list(next(iter(leaf.eval_docs)))
        if benchmark.cluster is not None and benchmark.cluster not in known:
            what = f"{name}: cluster {benchmark.cluster!r} is no field of its items"
            raise UserError(what, fix=nearest(benchmark.cluster, known))


def _higher_is_better(results: dict[str, Any], leaf: str, metric: str) -> bool:
    """As the task says, else by the metric's name."""
    said = results["higher_is_better"][leaf].get(metric)
    return not lower_is_better(metric) if said is None else bool(said)


def _task_key(request: Request, model_sha256: str, task: Any) -> str:
    """What decides the scores of a prepared benchmark, in one hash."""
    choice = dataclasses.asdict(request.choice)
    for name in ("path", "copies"):  # neither changes a score
        choice.pop(name)
    asked = {key: value for key, value in dataclasses.asdict(task.benchmark).items() if key not in ("title", "note")}
    if asked["cluster"] is None:
        del asked["cluster"]  # which files from before it do not have
    parts = [model_sha256, choice, request.limit, asked, task.definition_sha256, task.data_sha256, versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def evaluate(request: Request, report: Callable[[str, str, float], None]) -> dict[str, Any]:
    """Evaluate what is not done yet. report(benchmark, state, seconds) is called at "start", "done" and "kept", and on the
    way with "part" and the part that is done.

    Returns what is in `results.json`. UserError for unknown tasks and missing data, before the model is loaded.
    """
    lock = locks.held(locks.inside(request.output), request.output, "tinyllama eval")
    with lock, scratch.folder("tinyllama-eval-") as made:
        return _evaluate(request, report, made)


def _evaluate(request: Request, report: Callable[[str, str, float], None], folder: Path) -> dict[str, Any]:
    data = bundle.find(request.data_dir) if request.data_dir else None
    if data:
        bundle.go_offline(folder / "huggingface")
    quieten()
    from evalsuite import completions, passing
    from evalsuite.definitions import prepare

    report_of_overlap = contamination.load(request.contamination, data) if request.contamination else None
    prepared = [prepare(benchmark, data, folder) for benchmark in request.benchmarks]
    task_loading.refuse_shared(prepared)
    headline.refuse_mixed_units(request.own_suites, prepared)
    model_sha256 = backends.content_sha256(request.choice)
    if any(task.runs_programs for task in prepared):
        from evalsuite.sandbox import Sandbox

        Sandbox.shared()
    path = request.output / "results.json"
    before = earlier_results.read(path)
    refuse_foreign(request.output / "table.md", lambda text: text.startswith("## "), "tinyllama eval's")
    found: dict[str, Any] = {
        "format": FORMAT,
        "model": request.choice.path,
        "content_sha256": model_sha256,
        "tokens": backends.trained_tokens(request.choice),
        "backend": request.choice.backend,
        "protocol": request.protocol,
        "settings": {
            **{k: v for k, v in dataclasses.asdict(request.choice).items() if k not in ("path", "backend")},
            "limit": request.limit,
            "data_dir": request.data_dir,
        },
        "versions": versions(),
        "parity": before.get("parity"),
        "tasks": {},
        "suites": {},
        "own_suites": (before.get("own_suites") or {} if request.resume else {})
        | {suite.name: suite.record() for suite in request.own_suites},
    }
    keys = {t.benchmark.name: _task_key(request, model_sha256, t) for t in prepared}
    found["tasks"] = earlier_results.kept(before, found, keys) if request.resume else {}
    if request.resume and not request.overwrite:
        earlier_results.refuse_to_lose(path, before, found)
    missing = [t for t in prepared if t.benchmark.name not in found["tasks"]]
    context = backends.context(request.choice) if missing else None
    if request.choice.backend == "native" and any(task.generates for task in missing):
        generation_settings.check_model(Path(request.choice.path))
    for task in missing:
        generation_settings.check_tasks(task.generation, request.choice.backend, context)
        task.loaded = task_loading.load(task, request.limit)
        _refuse_unknown_cluster(task.benchmark, task.loaded.tasks)
    refuse_unwritable(path)
    export = ResultsFile(
        request.output / "lm_eval", found, {t.benchmark.export_name: keys[t.benchmark.name] for t in prepared}
    )
    own = [(suite, record["benchmarks"]) for suite, record in found["own_suites"].items()]
    model = None
    try:
        for task in prepared:
            name = task.benchmark.name
            key = keys[name]
            if name in found["tasks"]:
                report(name, "kept", found["tasks"][name]["seconds"])
                continue
            report(name, "start", 0.0)
            started = time.monotonic()
            if model is None:
                model = _proven_model(request, found, before)
            backends.watch(model, functools.partial(report, name, "part"))
            truncated_before = getattr(model, "num_truncated", None)
            results = run_task(model, task, request.limit)
            if results is None:
                raise RuntimeError("lm-eval returned nothing")
            entry = score(task.benchmark, results, task.leaves)
            entry["truncated_prompts"] = None if truncated_before is None else model.num_truncated - truncated_before
            entry["fewer_shots"] = results["fewer_shots"]
            entry["repeats"] = max(int(config.get("repeats") or 1) for config in results["configs"].values())
            if (entry["generation"] or {}).get("do_sample"):
                entry["sampling_seed"] = backends.sampling_seed(request.choice)
                entry["samples_per_problem"] = entry["repeats"]
            entry["seconds"] = round(time.monotonic() - started, 2)
            entry["key"] = key
            entry["data_sha256"] = task.data_sha256 and hashlib.sha256(task.data_sha256.encode()).hexdigest()
            entry["origins"] = contamination.origins(results["configs"], results["n-samples"], results["asked"])
            cluster = task.benchmark.cluster
            rows = list(samples.rows(results["samples"], entry["protocol"], results["asked"], cluster))
            samples.add_intervals(entry, samples.items(rows, entry["metric_key"]))
            write_json_lines(samples.path_of(request.output, name), rows)
            if task.benchmark.runs_programs or any(c.get("unsafe_code") for c in results["configs"].values()):
                entry["sandbox"] = passing.sandbox_record()
            if task.benchmark.runs_programs:
                completions.write(request.output, name, rows)
            export.add(entry["task"], entry, results)
            found["tasks"] = earlier_results.in_order({**found["tasks"], name: entry}, list(keys))
            found["suites"] = suite_means(found["tasks"], own)
            write_json(path, found)
            report(name, "done", entry["seconds"])
    finally:
        backends.close(model)
    found["suites"] = suite_means(found["tasks"], own)
    if report_of_overlap:
        contamination.add_clean_scores(found, request.output, report_of_overlap)
    write_json(path, found)
    return json.loads(path.read_text())


def _proven_model(request: Request, found: dict[str, Any], before: dict[str, Any]) -> Any:
    """The lm-eval model, after its comparison with the other implementation, which goes into found["parity"]."""
    from evalsuite import parity

    choice = request.choice
    proven = (before.get("parity") or {}).get("compared") and what_decides(before) == what_decides(found)
    if not request.parity_check:
        found["parity"] = {"compared": False, "reason": "--no-parity-check"}
    elif request.resume and proven:
        found["parity"] = before["parity"]
    else:
        found["parity"] = parity.not_compared(choice, found["content_sha256"])
    if found["parity"] is not None:
        return backends.make(choice, request.output)
    try:
        wanted = parity.expected(choice)
    except UserError as error:
        fix = f"{error.fix}; or use --no-parity-check"
        raise UserError(
            f"{choice.path} cannot be compared with another implementation: {error.what}", fix=fix
        ) from None
    model = backends.make(choice, request.output)
    try:
        found["parity"] = parity.compare(model, wanted, choice)
    except BaseException:
        backends.close(model)
        raise
    return model


def run_task(model: Any, task: Any, limit: int | None) -> dict[str, Any] | None:
    """lm-eval's results of one prepared benchmark; None in a process that is not the first of its launcher.

    What lm_eval.simple_evaluate does, with its seeds, but for the report on the environment that it takes from pip and the
    compiler for every call: a second each.
    """
    import lm_eval

    compile_templates_once()
    loaded = task_loading.take(task, limit)
    loaded.restore()
    for leaf in loaded.tasks.values():
        leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
        if hasattr(leaf, "fit_to"):
            leaf.fit_to(model)
    try:
        results = lm_eval.evaluate(
            lm=model, task_dict=loaded.everything, limit=limit, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=True
        )
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if not task.benchmark.own or not of_scoring(error):
            raise
        where = f"task {task.benchmark.name}: its answers cannot be scored"
        raise UserError(f"{where}: {reason(error)}", fix="correct the task") from error
    if results is None:
        return None
    for leaf in task.leaves:
        values = [v for k, v in results["results"][leaf].items() if "," in k and "_stderr" not in k]
        if any(isinstance(v, float) and math.isnan(v) for v in values):
            raise UserError(f"{leaf}: the model's scores are not numbers", fix="check the model's weights for NaN")
    for name, own in task.own.items():
        results["configs"][name] |= own.shown
    ours = {name: leaf for name, leaf in loaded.tasks.items() if hasattr(leaf, "fit_to")}
    asked = {name: rows for name, leaf in ours.items() if (rows := leaf.asked_rows())}
    return {**results, "fewer_shots": sum(leaf.num_fewer for leaf in ours.values()), "asked": asked}


def compile_templates_once() -> None:
    """From now on lm-eval keeps prompts' templates compiled; by itself it compiles one anew for every document and shot."""
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = functools.lru_cache(TEMPLATES)(env.from_string)


def quieten() -> None:
    """lm-eval and its libraries write progress and advice of their own; ours is shown instead."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("lm_eval", "lm-eval", "datasets", "transformers", "huggingface_hub", *TALKATIVE):
        logging.getLogger(name).setLevel(logging.ERROR)
