"""The two suites, benchmark by benchmark: lm-eval's tasks, shots, headline metric and what their numbers hide.

Commonsense: zero-shot, acc_norm where it exists, else acc, unweighted mean, as in TinyLlama's table. Problem solving:
MMLU 5-shot, BBH 3-shot, DROP 3-shot, HumanEval 0-shot, under one of two protocols: "harness", lm-eval's own prompts and
scoring, or "paper", instruct-eval's, which TinyLlama's numbers come from. Nothing here imports lm_eval.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from evalsuite import names
from tinyllama.errors import UserError, nearest

HARNESS, PAPER = PROTOCOLS = ("harness", "paper")

HUMANEVAL = "openai__openai_humaneval"
PAPER_TEMPERATURE = 0.1  # of tl_humaneval.yaml
DROP_NOTE = (
    "lm-eval's DROP joins the keys of the answer dictionary as the target of its few-shot examples, so the examples "
    "mislead; it also stops generation at the first full stop, which cuts decimals"
)
BBH_NOTE = (
    "lm-eval's direct BBH needs the exact string, unstripped: a tokenizer that decodes a leading space scores near zero"
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One column of the tables, made of one lm-eval task or of many leaf tasks.

    yaml: lm-eval's definitions, relative to its tasks folder, with a wildcard where there are many, or ours (protocol
    paper); None for a task that is only known by name. dataset: its folder in a bundle. metric: the headline metric (key
    before the comma); empty for the task's first. num_fewshot: None for the definition's. leaves: how many there must be,
    None where that is not known. task: what lm-eval calls it, where that is not the name. mean: over all items, or over
    the leaves' means; None for what lm-eval's group says, else items. samples, temperature: of the completions of a
    problem, where programs are run; None for the definition's. variant: another task's definition under a name of its
    own. own: `yaml` is a file of the user's.
    cluster: the field of an item whose content it shares with others, where that is none of the usual ones.
    """

    name: str
    title: str
    metric: str
    num_fewshot: int | None
    yaml: str | None = None
    dataset: str | None = None
    leaves: int | None = 1
    note: str | None = None
    task: str | None = None
    protocol: str = HARNESS
    mean: Literal["items", "leaves"] | None = "items"
    samples: int = 1
    temperature: float | None = None
    variant: bool = False
    own: bool = False
    cluster: str | None = None

    @property
    def lm_eval_name(self) -> str:
        """The task or group that lm-eval has by this name."""
        return self.task or self.name

    @property
    def export_name(self) -> str:
        """What it is called in lm-eval's own format."""
        return self.name if self.variant else self.lm_eval_name

    @property
    def fixed_shots(self) -> bool:
        """Whether its definition says how many shots there are, and which."""
        return self.lm_eval_name in ("bbh", "humaneval", "tl_bbh_direct", "tl_drop_prefix", "tl_humaneval")

    @property
    def runs_programs(self) -> bool:
        """Whether what the model writes is executed."""
        return self.dataset == HUMANEVAL

    @property
    def short(self) -> str:
        """The heading of a narrow column."""
        return {"hellaswag": "HellaS", "winogrande": "WinoG", "humaneval": "HumanE"}.get(self.name, self.title)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Benchmarks with one score: the unweighted mean of theirs."""

    name: str
    title: str
    members: tuple[Benchmark, ...]
    description: str | None = None

    def record(self) -> dict[str, Any]:
        """What results.json says of it, whether or not all of it was evaluated."""
        return {
            "title": self.title,
            "description": self.description,
            "benchmarks": [member.name for member in self.members],
            "titles": [member.short for member in self.members],
            "weighting": "unweighted mean of the tasks",
        }


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
    Benchmark("humaneval", "HumanEval", "pass@1", 0, "humaneval.yaml", HUMANEVAL),
)
# The same four as instruct-eval asks and scores them. Commonsense was measured with lm-eval: it has one protocol.
BY_PAPER = {
    found.name: found
    for found in (
        Benchmark("mmlu", "MMLU", "acc", 5, "tl_mmlu_gen.yaml", "cais__mmlu", 57, None, "tl_mmlu_gen", PAPER),
        Benchmark(
            "bbh", "BBH", "prefix_match", 3, "tl_bbh_direct.yaml", "SaylorTwift__bbh", 27, None, "tl_bbh_direct", PAPER,
            "leaves",
        ),
        Benchmark(
            "drop", "DROP", "prefix_match", 3, "tl_drop_prefix.yaml", "EleutherAI__drop", 1, None, "tl_drop_prefix", PAPER
        ),
        Benchmark("humaneval", "HumanEval", "pass@1", 0, "tl_humaneval.yaml", HUMANEVAL, 1, None, "tl_humaneval", PAPER),
    )
}  # fmt: skip
SUITES: dict[str, tuple[Benchmark, ...]] = {"commonsense": COMMONSENSE, "problem_solving": PROBLEM_SOLVING}
SUITE_TITLES = {"commonsense": "Commonsense reasoning (0-shot)", "problem_solving": "Problem solving"}
BENCHMARKS = {b.name: b for suite in SUITES.values() for b in suite}


def checked_protocol(name: str) -> str:
    """The protocol of that name; UserError if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}", fix=nearest(name, list(PROTOCOLS)))
    return name


def benchmark(name: str, protocol: str = HARNESS) -> Benchmark:
    """A benchmark of ours under a protocol, one of protocol paper by its task's name, or any lm-eval task by its own."""
    if protocol == PAPER and name in BY_PAPER:
        return BY_PAPER[name]
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    names.checked(name, "task")
    by_task = {member.lm_eval_name: member for member in BY_PAPER.values()}
    if name in by_task:
        return dataclasses.replace(by_task[name], name=name, title=name)
    return Benchmark(name, name, "", None, leaves=None, mean=None)


def choose(tasks: str, protocol: str = HARNESS) -> tuple[list[Benchmark], list[Suite]]:
    """Benchmarks named by a comma-separated list of suites, their files, benchmarks, `all`, or any lm-eval task; and the
    suites of the user's own among them.

    A name that is not ours is taken as an lm-eval task (checked later, against its index); UserError on an empty list.
    """
    from evalsuite import own_suites

    chosen: dict[str, Benchmark] = {}
    own: list[Suite] = []
    for name in (part.strip() for part in tasks.split(",")):
        if not name:
            continue
        if own_suites.is_file(name):
            own.append(own_suites.load(Path(name), protocol))
            found = list(own[-1].members)
        else:
            members = (
                list(BENCHMARKS) if name == "all" else [m.name for m in SUITES[name]] if name in SUITES else [name]
            )
            found = [benchmark(member, protocol) for member in members]
        for member in found:
            key = member.name.casefold()  # the files of two of them would be one where capitals do not count
            if chosen.setdefault(key, member) != member:
                raise UserError(f"--tasks asks for {member.name!r} twice, in two ways", fix="give one another name")
    if not chosen:
        raise UserError(
            f"--tasks {names.short(tasks)} names no task", fix="give commonsense, problem_solving, all or task names"
        )
    titles = [suite.name.casefold() for suite in own]
    if len(set(titles)) < len(own):
        raise UserError("--tasks names two suites of one name", fix="rename one")
    if both := next((name for name in titles if name in chosen), None):
        raise UserError(f"--tasks names a task and a suite {both!r}", fix="rename one")
    return list(chosen.values()), own


def select(tasks: str, protocol: str = HARNESS) -> list[Benchmark]:
    """The benchmarks of `choose`."""
    return choose(tasks, protocol)[0]


def sampled(benchmarks: list[Benchmark], count: int, temperature: float | None) -> list[Benchmark]:
    """The same with so many completions a problem, drawn at this temperature, where programs are run.

    Without a temperature one completion is the definition's; of more, instruct-eval's temperatures: 0.6 up to ten, else 0.8.
    UserError where nothing is drawn, or all would be the same.
    """
    if count == 1 and temperature is None:
        return benchmarks
    if count < 1:
        raise UserError(f"--samples-per-problem {count}", fix="give 1 or more")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}", fix="give 0 or more")
    if not any(found.runs_programs for found in benchmarks):
        option = "--samples-per-problem" if count > 1 else "--temperature"
        raise UserError(
            f"{option} is for humaneval, which --tasks does not name", fix="add it, or leave the option out"
        )
    if count > 1 and temperature == 0:
        raise UserError(f"--samples-per-problem {count} at --temperature 0 would all be the same", fix="raise it")
    if temperature is None:
        temperature = 0.6 if count <= 10 else 0.8
    return [
        dataclasses.replace(found, samples=count, temperature=temperature) if found.runs_programs else found
        for found in benchmarks
    ]


def unknown_task(name: str, known: list[str]) -> UserError:
    """The error for a name that neither we nor lm-eval know."""
    ours = [member.lm_eval_name for member in BY_PAPER.values()]
    fix = nearest(name, [*known, *ours, *SUITES, *BENCHMARKS, "all"])
    if fix.startswith("valid: "):  # fourteen thousand names
        fix = f"give {', '.join(SUITES)}, all, one of {', '.join(BENCHMARKS)}, or a task, group or tag of lm-eval"
    return UserError(f"unknown task {name!r}", fix=fix)
