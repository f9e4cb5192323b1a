"""The two suites, benchmark by benchmark: lm-eval's tasks, shots, headline metric and what their numbers hide.

Commonsense: zero-shot, acc_norm where it exists, else acc, unweighted mean, as in TinyLlama's table. Problem solving:
MMLU 5-shot, BBH 3-shot, DROP 3-shot, HumanEval 0-shot. Nothing here imports lm_eval.
"""

from __future__ import annotations

import dataclasses

from tinyllama.errors import UserError, nearest

DROP_NOTE = (
    "lm-eval's DROP joins the keys of the answer dictionary as the target of its few-shot examples, so the examples "
    "mislead; it also stops generation at the first full stop, which cuts decimals"
)
BBH_NOTE = (
    "lm-eval's direct BBH needs the exact string, unstripped: a tokenizer that decodes a leading space scores near zero"
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One column of the tables, made of one lm-eval task or of many leaf tasks averaged over their items.

    yaml: lm-eval's definitions, relative to its tasks folder, with a wildcard where there are many; None for a task that
    is only known by name. dataset: its folder in a bundle. metric: the headline metric (key before the comma).
    """

    name: str
    title: str
    metric: str
    num_fewshot: int
    yaml: str | None = None
    dataset: str | None = None
    leaves: int = 1
    note: str | None = None

    @property
    def short(self) -> str:
        """The heading of a narrow column."""
        return {"hellaswag": "HellaS", "winogrande": "WinoG", "humaneval": "HumanE"}.get(self.name, self.title)


COMMONSENSE = (
    Benchmark("hellaswag", "HellaSwag", "acc_norm", 0, "hellaswag/hellaswag.yaml", "Rowan__hellaswag"),
    Benchmark("openbookqa", "OBQA", "acc_norm", 0, "openbookqa/openbookqa.yaml", "allenai__openbookqa"),
    Benchmark("winogrande", "WinoGrande", "acc", 0, "winogrande/default.yaml", "allenai__winogrande"),
    Benchmark("arc_challenge", "ARC-c", "acc_norm", 0, "arc/arc_challenge.yaml", "allenai__ai2_arc"),
    Benchmark("arc_easy", "ARC-e", "acc_norm", 0, "arc/arc_easy.yaml", "allenai__ai2_arc"),
    Benchmark("boolq", "BoolQ", "acc", 0, "super_glue/boolq/default.yaml", "aps__super_glue"),
    Benchmark("piqa", "PIQA", "acc_norm", 0, "piqa/piqa.yaml", "baber__piqa"),
)
PROBLEM_SOLVING = (
    Benchmark("mmlu", "MMLU", "acc", 5, "mmlu/default/mmlu_*.yaml", "cais__mmlu", 57),
    Benchmark("bbh", "BBH", "exact_match", 3, "bbh/fewshot/*.yaml", "SaylorTwift__bbh", 27, BBH_NOTE),
    Benchmark("drop", "DROP", "f1", 3, "drop/default.yaml", "EleutherAI__drop", 1, DROP_NOTE),
    Benchmark("humaneval", "HumanEval", "pass@1", 0, "", "openai__openai_humaneval"),
)
SUITES: dict[str, tuple[Benchmark, ...]] = {"commonsense": COMMONSENSE, "problem_solving": PROBLEM_SOLVING}
SUITE_TITLES = {"commonsense": "Commonsense reasoning (0-shot)", "problem_solving": "Problem solving"}
BENCHMARKS = {b.name: b for suite in SUITES.values() for b in suite}


def select(names: str) -> list[Benchmark]:
    """Benchmarks named by a comma-separated list of suites and benchmarks, `all`, or any lm-eval task.

    A name that is not ours is taken as an lm-eval task (checked later, against its index); UserError on an empty list.
    """
    chosen: dict[str, Benchmark] = {}
    for name in (part.strip() for part in names.split(",")):
        if not name:
            continue
        if name == "all":
            members: tuple[Benchmark, ...] = (*COMMONSENSE, *PROBLEM_SOLVING)
        elif name in SUITES:
            members = SUITES[name]
        elif name in BENCHMARKS:
            members = (BENCHMARKS[name],)
        else:
            members = (Benchmark(name, name, "", 0),)
        chosen.update({member.name: member for member in members})
    if not chosen:
        raise UserError(f"--tasks {names!r} names no task", fix="give commonsense, problem_solving, all or task names")
    return list(chosen.values())


def unknown_task(name: str, known: list[str]) -> UserError:
    """The error for a name that neither we nor lm-eval know."""
    return UserError(f"unknown task {name!r}", fix=nearest(name, [*known, *SUITES, *BENCHMARKS, "all"]))
