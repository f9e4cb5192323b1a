"""Checks what lm-eval task definitions say before a model is loaded: a user's own, field by field; a group's, together.

lm-eval takes most values as they are and fails with them after the model has answered, or leaves them out without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalsuite import rows, yaml_files
from evalsuite.names import short
from evalsuite.yaml_files import FIX, Function
from tinyllama.errors import UserError, nearest

GENERATED = "generate_until"  # the output_type of tasks that name none
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", GENERATED)
# The metrics that lm-eval 0.4.13 computes for each output_type, without a process_results, and how they can be aggregated.
PLAIN = ("mean", "median", "nanmean")
METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "multiple_choice": {
        "acc": PLAIN, "acc_norm": PLAIN, "acc_bytes": PLAIN, "acc_mutual_info": PLAIN, "exact_match": PLAIN,
        "f1": ("f1",), "mcc": ("matthews_corrcoef",), "brier_score": ("brier_score",),
    },
    "loglikelihood": {"acc": PLAIN, "perplexity": ("perplexity", *PLAIN)},
    "loglikelihood_rolling": {
        "word_perplexity": ("weighted_perplexity",), "byte_perplexity": ("weighted_perplexity",),
        "bits_per_byte": ("bits_per_byte",),
    },
    GENERATED: {
        "exact_match": PLAIN, "bleu": ("bleu",), "chrf": ("chrf",), "chrf++": ("chrf++",), "ter": ("ter",),
    },
}  # fmt: skip
# Metrics that lm-eval hands on as they are, for an aggregation that is a function: (target, what was computed) of each item.
HANDED_ON: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("likelihood",),
    GENERATED: (
        "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_score", "f1", "likelihood", "mcc", "perplexity",
    ),
}  # fmt: skip
REFUSED = {
    "doc_to_image": "the models here read text alone",
    "doc_to_audio": "the models here read text alone",
    "use_prompt": "write the prompt as doc_to_text, doc_to_choice and doc_to_target",
    "group": "name a group's tasks one by one in a suite",
    "task_list": "give each task a file of its own",
}
TEXT, NUMBER, FLAG = (str,), (int,), (bool,)
TEMPLATE = (str, Function)
FIELDS: dict[str, tuple[type, ...]] = {
    "task": TEXT, "task_alias": TEXT, "tag": (str, list), "class": (Function,), "custom_dataset": (Function,),
    "dataset_path": TEXT, "dataset_name": TEXT, "dataset_kwargs": (dict,), "training_split": TEXT,
    "validation_split": TEXT, "test_split": TEXT, "fewshot_split": TEXT, "process_docs": (Function,),
    "doc_to_text": (str, Function, int), "doc_to_target": (str, Function, int, list),
    "doc_to_choice": (str, Function, list, dict), "process_results": (Function,), "description": TEXT,
    "target_delimiter": TEXT, "fewshot_delimiter": TEXT, "fewshot_config": (dict,), "num_fewshot": NUMBER,
    "metric_list": (list,), "output_type": TEXT, "generation_kwargs": (dict,), "repeats": NUMBER, "filter_list": (list,),
    "should_decontaminate": FLAG, "doc_to_decontamination_query": TEMPLATE, "gen_prefix": TEXT, "metadata": (dict,),
    "unsafe_code": FLAG,
}  # fmt: skip
SHOT_FIELDS: dict[str, tuple[type, ...]] = {
    "sampler": (str, Function), "split": TEXT, "process_docs": (Function,), "samples": (list, Function),
    "doc_to_text": (str, Function), "doc_to_choice": (str, Function, list, dict), "doc_to_target": (str, Function),
    "gen_prefix": TEXT, "fewshot_delimiter": TEXT, "target_delimiter": TEXT,
}  # fmt: skip
REQUIRED = (
    "target_delimiter",
    "fewshot_delimiter",
    "description",
    "repeats",
    "output_type",
)  # null is no value of these
LEAST = {"num_fewshot": 0, "repeats": 1}
WORDS: dict[type, str] = {
    str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "a mapping",
    Function: "a !function",
}  # fmt: skip


def check(config: dict[str, Any], where: str) -> None:
    """UserError, beginning with `where`, for a field of a user's own task that means nothing, or not what it says."""
    if "class" in config:  # which may have any fields of its own
        _check_fields({key: value for key, value in config.items() if key in FIELDS}, FIELDS, where)
        return
    _check_fields(config, FIELDS, where)
    output_type = config.get("output_type", GENERATED)
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"{where}: output_type {short(output_type)}", fix=nearest(output_type, list(OUTPUT_TYPES)))
    for key in ("doc_to_text", "doc_to_target"):
        if config.get(key) is None and not (key == "doc_to_text" and output_type == "loglikelihood_rolling"):
            raise UserError(f"{where}: {key} is missing", fix=f"add {key}:")
    if output_type == "multiple_choice" and config.get("doc_to_choice") is None:
        raise UserError(f"{where}: doc_to_choice is missing", fix="add doc_to_choice:")
    _check_data(config, where)
    _check_shots(config, where)
    _check_metrics(config, output_type, where)
    _check_filters(config, where)


def _check_fields(config: dict[str, Any], fields: dict[str, tuple[type, ...]], where: str) -> None:
    for key, value in config.items():
        if key in REFUSED and value is not None:
            raise UserError(f"{where}: {key} is not supported", fix=REFUSED[key])
        if key not in fields and key not in REFUSED:
            raise UserError(f"{where}: unknown field {short(key)}", fix=nearest(key, list(fields)))
        if value is None and key not in REQUIRED:
            continue
        kinds = fields.get(key, ())
        if type(value) not in kinds:
            words = " or ".join(WORDS[kind] for kind in kinds)
            raise UserError(f"{where}: {key} {short(value)} is not {words}", fix=FIX)
        if key in LEAST and value < LEAST[key]:
            raise UserError(f"{where}: {key} {value}", fix=f"give {LEAST[key]} or more")


def _check_data(config: dict[str, Any], where: str) -> None:
    """Where the rows come from, and which of them are asked."""
    path = config.get("dataset_path")
    if path is None and config.get("custom_dataset") is None:
        raise UserError(f"{where}: dataset_path is missing", fix=f"give one of {', '.join(rows.FORMATS)}, or a hub id")
    if path == "" and config.get("custom_dataset") is not None:
        path = None  # the rows come from the function
    if path is not None and (path.startswith((".", "/", "~")) or not path.strip() or Path(path).exists()):
        raise UserError(
            f"{where}: dataset_path {short(path)} is a place on this machine",
            fix=f"give one of {', '.join(rows.FORMATS)}, and the files as dataset_kwargs.data_files",
        )
    if config.get("test_split") is None and config.get("validation_split") is None:
        raise UserError(
            f"{where}: neither test_split nor validation_split is there", fix="name the split that is asked"
        )
    if path not in rows.FORMATS:
        return
    if config.get("dataset_name") is not None:
        raise UserError(f"{where}: dataset_name {short(config['dataset_name'])} with files", fix="leave it out")
    kwargs = config.get("dataset_kwargs") or {}
    files = kwargs.get("data_files")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{where}: dataset_kwargs.data_files names no files", fix="give a file for each split")
    for key in kwargs:
        if key not in ("data_files", *rows.OPTIONS[path]):
            raise UserError(
                f"{where}: dataset_kwargs.{key} has no meaning for {path} files",
                fix=f"valid: {', '.join(('data_files', *rows.OPTIONS[path]))}",
            )
    shots = (config.get("fewshot_config") or {}).get("split")
    named = {"fewshot_config.split": shots} | {
        key: config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")
    }
    for key, split in named.items():
        if split is not None and split not in files:
            raise UserError(
                f"{where}: {key} {short(split)} is none of data_files", fix=nearest(split, list(map(str, files)))
            )
    for split in files:
        if not isinstance(split, str) or not split.replace("_", "").isalnum() or not split.isascii():
            raise UserError(f"{where}: data_files names a split {short(split)}", fix="use letters, digits and _")


def _check_shots(config: dict[str, Any], where: str) -> None:
    shots = config.get("fewshot_config") or {}
    if "fewshot_indices" in shots:
        raise UserError(
            f"{where}: fewshot_config.fewshot_indices is left out by lm-eval", fix="give a file of the shots"
        )
    _check_fields(shots, SHOT_FIELDS, f"{where}: fewshot_config")
    sampler = shots.get("sampler")
    if type(sampler) is str and sampler not in ("default", "first_n"):
        raise UserError(
            f"{where}: fewshot_config.sampler {short(sampler)}", fix=nearest(sampler, ["default", "first_n"])
        )
    samples = shots.get("samples")
    if isinstance(samples, list) and not all(isinstance(row, dict) for row in samples):
        raise UserError(f"{where}: fewshot_config.samples holds what is no row", fix="give a mapping for each")


def _check_metrics(config: dict[str, Any], output_type: str, where: str) -> None:
    metrics = config.get("metric_list")
    if metrics is None:
        return
    if not metrics:
        raise UserError(f"{where}: metric_list is empty", fix="name a metric, or leave the field out")
    known = METRICS[output_type]
    seen = set[str]()
    for number, metric in enumerate(metrics, 1):
        place = f"{where}: metric {number}"
        if not isinstance(metric, dict) or not isinstance(metric.get("metric"), str):
            raise UserError(f"{place}: {short(metric)} names no metric", fix="give {metric: NAME}")
        name, how = metric["metric"], metric.get("aggregation")
        if name in seen:
            raise UserError(f"{place}: {name} is there twice", fix="keep one of them")
        seen.add(name)
        own = config.get("process_results") is not None
        if metric.get("hf_evaluate") and not own:
            fix = "write the metric as process_results" if output_type == GENERATED else "leave it out"
            raise UserError(f"{place}: hf_evaluate fetches a program", fix=fix)
        if not isinstance(metric.get("higher_is_better", True), bool):
            raise UserError(f"{place}: higher_is_better {short(metric['higher_is_better'])}", fix="give true or false")
        if how is not None and not isinstance(how, str):
            raise UserError(f"{place}: aggregation {short(how)} is not text", fix=FIX)
        if own:
            _check_aggregation(place, name, how)
        elif type(name) is not Function and not (type(how) is Function and name in HANDED_ON.get(output_type, ())):
            if name not in known:
                raise UserError(
                    f"{place}: {short(name)} is no metric of {output_type} tasks", fix=nearest(name, list(known))
                )
            if how is not None and type(how) is not Function and how not in known[name]:
                raise UserError(f"{place}: {name} has no aggregation {short(how)}", fix=nearest(how, list(known[name])))


def _check_aggregation(place: str, name: str, how: Any) -> None:
    from lm_eval.api import metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import AGGREGATION_REGISTRY, metric_agg_registry

    if how is None and name not in metric_agg_registry:
        raise UserError(f"{place}: aggregation is missing", fix="add aggregation: mean, say")
    if type(how) is str and how not in AGGREGATION_REGISTRY:
        raise UserError(f"{place}: aggregation {short(how)}", fix=nearest(how, list(AGGREGATION_REGISTRY)))


def _check_filters(config: dict[str, Any], where: str) -> None:
    import lm_eval.filters  # noqa: F401 - registers them
    from lm_eval.api.registry import filter_registry

    may_register = any(yaml_files.functions(config))  # the module of any function of the task's, when it is imported
    seen = set[str]()
    for number, chain in enumerate(config.get("filter_list") or [], 1):
        place = f"{where}: filter {number}"
        steps = chain.get("filter") if isinstance(chain, dict) else None
        if not isinstance(steps, list) or not isinstance(chain.get("name"), str) or "," in chain["name"]:
            raise UserError(
                f"{place}: {short(chain)} is no filter", fix="give {name: NAME, filter: [{function: NAME}]}"
            )
        if chain["name"] in seen:
            raise UserError(f"{place}: name {chain['name']!r} is there twice", fix="give one another name")
        seen.add(chain["name"])
        for step in steps:
            name = step.get("function") if isinstance(step, dict) else None
            known = type(name) is Function or name in filter_registry or may_register
            if not isinstance(name, str) or not known:
                fix = nearest(str(name), sorted(filter_registry))
                raise UserError(f"{place}: function {short(name)}", fix=fix)
            select = step.get("group_select", 0)
            if name in ("regex", "multi_choice_regex") and (type(select) is not int or select not in (0, -1)):
                raise UserError(
                    f"{place}: group_select {short(select)} is the number of a match, of which a text may have fewer",
                    fix="give 0, the first, or -1, the last; of a match with groups the first that is not empty counts",
                )


def metrics_of(config: dict[str, Any]) -> list[str]:
    """The names of a task's metrics, in its order; lm-eval's defaults for its output_type where it names none."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    given = []
    for metric in config.get("metric_list") or []:
        name = str(metric.get("metric"))
        if (
            "/" in name or type(metric.get("metric")) is Function
        ):  # a function; pass_at_k, say, makes a metric for each k
            ks = metric.get("k")
            given += [f"pass@{k}" for k in ks] if isinstance(ks, list) else [name.rsplit(".", 1)[-1]]
        else:
            given.append(name)
    return given or list(DEFAULT_METRIC_REGISTRY.get(config.get("output_type") or GENERATED, []))


def refuse_mixed(benchmark: str, leaves: Sequence[tuple[str, list[str]]]) -> None:
    """UserError for a group without one metric that all of its tasks have. leaves: the tasks' names and metrics."""
    if not set.intersection(*(set(metrics) for _, metrics in leaves)):
        firsts: dict[tuple[str, ...], str] = {}
        for name, metrics in leaves:
            firsts.setdefault(tuple(metrics), f"{name} {', '.join(metrics)}")
        few = leaves if len(leaves) <= 12 else leaves[:12]
        tasks = ",".join(name for name, _ in few) + (",..." if len(few) < len(leaves) else "")
        shown = "; ".join(list(firsts.values())[:4])
        raise UserError(
            f"the tasks of {benchmark} have no metric in common ({shown}): they have no one score",
            fix=f"name them one by one: --tasks {tasks}",
        )


def runs_programs(name: str, config: dict[str, Any]) -> bool:
    """Whether a task has what the model wrote executed; UserError where that would not be in our sandbox.

    config: as lm-eval's load_yaml gives it with resolve_func=False.
    """
    from evalsuite import code_tasks

    if not config.get("unsafe_code"):
        return False
    if not code_tasks.runs_in_sandbox(config):
        raise UserError(
            f"{name} runs programs that the model wrote, and not in the sandbox", fix="use humaneval, or leave it out"
        )
    return True
