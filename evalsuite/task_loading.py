"""Builds lm-eval's task objects before the model is loaded, so that what is wrong with them costs no model's time.

`item_checks` tries their items. What lm-eval's seeds decide stays as it is when a task is built by lm-eval itself.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalsuite import code_tasks
from evalsuite.answer_checks import AnswerChecks
from evalsuite.definitions import Prepared
from evalsuite.item_checks import MULTIPLE_CHOICE, ItemChecks, reason
from evalsuite.lm_eval_format import FEWSHOT_SEED, SEED
from evalsuite.rows import Rows
from evalsuite.task_config import GENERATED, metrics_of
from tinyllama.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """lm-eval's task objects by name, and the state of the random generators after they were built."""

    tasks: dict[str, Any]
    everything: dict[str, Any]
    states: tuple[Any, Any, Any]

    def restore(self) -> None:
        """Continue the random generators where building the tasks left them, whatever was drawn since."""
        import numpy as np
        import torch

        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])


def refuse_shared(prepared: Sequence[Prepared]) -> None:
    """UserError where two benchmarks ask one task of lm-eval in two ways: its own format has one entry for each task."""
    asked: dict[str, Any] = {}
    for task in prepared:
        for leaf in task.leaves:
            first = asked.setdefault(leaf, task.benchmark)
            if first.num_fewshot != task.benchmark.num_fewshot or (
                first.yaml != task.benchmark.yaml and (first.own or task.benchmark.own)
            ):
                raise UserError(
                    f"{first.name} and {task.benchmark.name} both ask {leaf}, in two ways",
                    fix="evaluate one of them with another --output",
                )


def load(prepared: Prepared, limit: int | None = None) -> Loaded:
    """A prepared benchmark's task objects, with lm-eval's seeds; at the first time UserError where something is wrong with
    them, or with those of their items that are asked.
    """
    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    found = _built(prepared)
    loaded = Loaded(found["tasks"], found, (random.getstate(), np.random.get_state(), torch.get_rng_state()))
    for name, task in loaded.tasks.items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        if not prepared.checked:
            own = prepared.own.get(name)
            if own is not None and hasattr(task, "fewshot_cfg"):
                ItemChecks(task, own.tables).run()
                AnswerChecks(task).run()
            else:
                _refuse_few_shots(name, task)
                _check_labels(task, limit)
    prepared.checked = True
    return loaded


def take(prepared: Prepared, limit: int | None = None) -> Loaded:
    """What was loaded before, once; else it is loaded now."""
    found, prepared.loaded = prepared.loaded, None
    return found or load(prepared, limit)


def _built(prepared: Prepared) -> dict[str, Any]:
    benchmark = prepared.benchmark
    if prepared.runs_programs:
        code_tasks.install()
    try:
        found = prepared.manager.load(list(prepared.leaves))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        for name, own in prepared.own.items():
            _find_item(prepared.manager.task_index[name].yaml_path, own.tables)
        where = str(benchmark.yaml) if benchmark.own else f"task {benchmark.lm_eval_name}"
        if str(error) == "string index out of range":  # of the first item's choices
            raise UserError(f"{where}, item 0: a choice is empty", fix="no choice may be empty") from None
        fix = "correct the task's file" if benchmark.own else "check its data (--data-dir), or leave it out"
        raise UserError(f"{where} cannot be built ({reason(error)})", fix=fix) from error
    for task in found["tasks"].values():
        if prepared.runs_programs and getattr(task, "UNSAFE_CODE", False):
            code_tasks.serve(task)
            task.UNSAFE_CODE = False  # its programs run in the sandbox
    return found


def _find_item(overlay: Path, tables: dict[str, Rows]) -> None:
    """UserError for the item with which lm-eval fails to build a task; nothing where the fault is another.

    lm-eval tries the first item while it builds the task, and says neither which row nor which key it was.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.task import TaskConfig
    from lm_eval.tasks._yaml_loader import load_yaml

    class Unbuilt(ConfigurableTask):
        """Of a task, what turns rows into items."""

        def __init__(self, config: dict[str, Any], docs: list[Any]) -> None:
            self._config, self.prompt, self.OUTPUT_TYPE = (
                TaskConfig(**config),
                None,
                config.get("output_type", GENERATED),
            )
            self.task_docs = docs
            self.features = list(docs[0]) if docs else []
            self._metric_fn_list = dict.fromkeys(metrics_of(config))

    try:
        config = {key: value for key, value in load_yaml(overlay).items() if key not in ("tag", "class", "group")}
        split = config.get("test_split") or config["validation_split"]
        names = list(dict.fromkeys(name for table in tables.values() for row in table.rows for name in row))
        docs = [{name: row.get(name) for name in names} for row in tables[split].rows]
        if process_docs := config.get("process_docs"):
            docs = list(process_docs(Dataset.from_list(docs)))
        checks = ItemChecks(Unbuilt(config, docs), tables)
    except (Exception, SystemExit):  # noqa: BLE001 - what fails here failed before, and is told as it was then
        return
    checks.items()


def _refuse_few_shots(name: str, task: Any) -> None:
    """UserError where a task has fewer rows for its shots than shots."""
    shots, sampler = task.get_config("num_fewshot") or 0, getattr(task, "sampler", None)
    if shots and type(task).__name__ == "ConfigurableTask" and sampler is not None and len(sampler.df) < shots:
        raise UserError(f"{name} has {len(sampler.df)} rows for its {shots} shots", fix="ask for fewer")


def _check_labels(task: Any, limit: int | None) -> None:
    """UserError for an item whose label is none of its choices. lm-eval counts it as wrong, and warns where nobody looks."""
    of_choices = getattr(task, "OUTPUT_TYPE", None) == MULTIPLE_CHOICE and hasattr(task, "fewshot_cfg")
    if of_choices and not callable(task.config.process_results) and not task.multiple_input:
        ItemChecks(task, {}).labels(limit)
