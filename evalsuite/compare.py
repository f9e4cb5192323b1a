"""Models, checkpoints and published rows side by side, each score's difference from the first model's tested.

Two evaluations of the same items are compared item by item. Where that cannot be (a published row, no per-item logs), two
separate means are, and the comparison says so; where the numbers do not mean the same (another protocol, other data),
nothing is tested. All p-values of a comparison are corrected together.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evalsuite import samples, scores
from evalsuite.scores import Log, Model, Score
from evalsuite.suites import SUITES
from tinyllama.errors import UserError
from tinyllama.stats.intervals import Interval
from tinyllama.stats.means import ALPHA, holm
from tinyllama.stats.paired import Difference, Pairs, mean_of, paired, separate
from tinyllama.units import SHARE


class Tested(NamedTuple):
    """A test, or the reason why there is none; and the items that were paired, which a suite's test takes too."""

    test: Difference | None = None
    reason: str | None = None
    pairs: tuple[Pairs, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model's score beside the first one's. `test` is None where nothing could be tested; `reason` says why."""

    model: str
    task: str
    difference: float  # of the values shown; the test's own is over the items that both answered
    test: Difference | None
    reason: str | None
    p_holm: float | None
    higher_is_better: bool
    unit: str = SHARE

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def change(self) -> float:
        """The difference that counts: over the same items where it was tested so."""
        return self.test.difference if self.test else self.difference

    @property
    def gain(self) -> float:
        """The difference, positive if it is for the better."""
        return self.change if self.higher_is_better else -self.change

    @property
    def verdict(self) -> str:
        """In words."""
        if self.test is None:
            return f"not tested: {self.reason}"
        if not self.significant:
            return "within noise"
        return "better" if self.gain > 0 else "worse"


@dataclasses.dataclass(frozen=True)
class Report:
    """The models in the order given, each suite's benchmarks, tasks of no suite, and all comparisons with the first."""

    models: list[Model]
    suites: dict[str, list[str]]
    others: list[str]
    comparisons: list[Comparison]

    def comparison(self, model: Model, task: str) -> Comparison | None:
        return next((c for c in self.comparisons if (c.model, c.task) == (model.name, task)), None)

    def tasks(self) -> list[str]:
        """Every benchmark and suite that any model has, in the order of the tables."""
        order = [task for suite, members in self.suites.items() for task in (*members, suite)]
        return [task for task in dict.fromkeys((*order, *self.others)) if any(task in m.scores for m in self.models)]


def _distinct(models: list[Model]) -> list[Model]:
    """Models of the same name are told apart by where their results lie."""
    named = models
    for place in (lambda m: Path(m.source).parent.name, lambda m: m.source):
        seen = Counter(model.name for model in named)
        named = [
            new if seen[new.name] == 1 else dataclasses.replace(new, name=f"{old.name} ({place(old)})")
            for old, new in zip(models, named, strict=True)
        ]
    twice = next((name for name, count in Counter(m.name for m in named).items() if count > 1), None)
    if twice:
        raise UserError(f"{twice} is given twice", fix="give each result once")
    return named


def _paired(before: Log, after: Log, score: Score) -> Tested:
    """The test on the items that both answered; nothing where there are no logs to compare. score: the first one."""
    (first, means), (second, other_means) = before, after
    how = next((mean for mean in means if mean in other_means), None)
    if how is None:
        return Tested()
    others = {item.key: item.value for item in second}
    common = [item for item in first if item.key in others]
    if not common:
        return Tested(reason="no item in common")
    leaves = [common] if how == "items" else list(samples.by_leaf(common).values())
    pairs = tuple(_pairs(items, [others[item.key] for item in items], 1 / len(leaves)) for items in leaves)
    if score.metric in samples.EXPONENTIALS:
        return Tested(_of_logarithms(paired(pairs, share=False), score.value))
    return Tested(paired(pairs, score.unit == SHARE), None, pairs)


def _pairs(items: list[samples.Item], others: list[float], weight: float) -> Pairs:
    sizes = [item.size for item in items]
    groups = [item.group for item in items]
    return Pairs([i.value for i in items], others, weight, groups, None if all(s == 1 for s in sizes) else sizes)


def _of_logarithms(found: Difference, first: float) -> Difference:
    """A difference of logarithms as one of the scores themselves, of which the first is known."""

    def change(logarithm: float) -> float:
        return first * math.expm1(min(logarithm, 700.0))

    interval = found.interval and Interval(
        change(found.interval.low), change(found.interval.high), "t, of the logarithm"
    )
    return dataclasses.replace(
        found, difference=change(found.difference), stderr=first * found.stderr, interval=interval
    )


def _test(first: Model, model: Model, task: str, log: Log) -> Tested:
    """The test that two scores permit. log: of the first."""
    before, after = first.scores[task], model.scores[task]
    reason = scores.other_sense(after, before)
    if reason:
        return Tested(reason=reason)
    found = _paired(log, model.log(task), before)
    if found.test or found.reason:
        return found
    if scores.other_data(after, before):
        return Tested(reason="other data")
    if before.estimate is None or after.estimate is None:
        return Tested(reason="no standard error")
    return Tested(separate(before.estimate, after.estimate))


def _suite_test(first: Model, model: Model, suite: str, tests: dict[str, Tested]) -> Tested:
    """The test of a suite's mean: of all its benchmarks' items where all are paired, else from the benchmarks' tests."""
    members = first.suites[suite]
    if set(members) != set(model.suites[suite]):
        return Tested(reason="other benchmarks")
    parts = [tests.get(name, Tested(reason=f"{name} is not in both")) for name in members]
    reason = next((part.reason for part in parts if part.test is None), None)
    if reason:
        return Tested(reason=reason)
    share = first.scores[suite].unit == SHARE
    if all(part.pairs for part in parts):
        weighed = [dataclasses.replace(p, weight=p.weight / len(parts)) for part in parts for p in part.pairs]
        return Tested(paired(weighed, share))
    return Tested(mean_of([part.test for part in parts if part.test], share))


def _by_tokens(models: list[Model]) -> list[Model]:
    unknown = next((model for model in models if model.tokens is None), None)
    if unknown:
        raise UserError(f"--curve: nothing says how many tokens {unknown.name} has seen", fix="leave it out")
    return sorted(models, key=lambda model: model.tokens or 0)


def compare(names: Sequence[str], by_tokens: bool = False) -> Report:
    """Load every row and test its scores against the first row's. by_tokens: the first is the one that has seen fewest.
    UserError for what cannot be read.
    """
    models = _distinct([scores.load(name) for name in names])
    models = _by_tokens(models) if by_tokens else models
    given = {suite: members for model in models for suite, members in model.suites.items()}
    suites = {suite: [member.name for member in members] for suite, members in SUITES.items()} | given
    known = {*suites, *(task for members in suites.values() for task in members)}
    others = dict.fromkeys(task for model in models for task in model.scores if task not in known)
    first, tests = models[0], {model.name: dict[str, Tested]() for model in models[1:]}
    for task in first.scores:
        rivals = [model for model in models[1:] if task in model.scores and task not in first.suites]
        log: Log = first.log(task) if rivals else ([], ())  # read once: a log may be large
        for model in rivals:
            tests[model.name][task] = _test(first, model, task, log)
    comparisons = []
    for model in models[1:]:
        found = tests[model.name]
        found |= {s: _suite_test(first, model, s, found) for s in first.suites if s in model.suites}
        for task, tested in found.items():
            before, after = first.scores[task], model.scores[task]
            own = (tested.test, tested.reason, None, before.higher_is_better, before.unit)
            comparisons.append(Comparison(model.name, task, after.value - before.value, *own))
    corrected = iter(holm([c.test.p for c in comparisons if c.test]))
    comparisons = [dataclasses.replace(c, p_holm=next(corrected)) if c.test else c for c in comparisons]
    return Report(models, suites, list(others), comparisons)
