"""Tries a user's own task on made answers: its filters and its process_results.

lm-eval runs both after the model has answered everything. What would fail there, or score every answer as wrong without a
word (an answer that is left in a list), is told here in one line, before there is a model.
"""

from __future__ import annotations

import itertools
import numbers
import traceback
from collections.abc import Sequence
from typing import Any

from evalsuite.item_checks import MULTIPLE_CHOICE, reason
from evalsuite.names import short
from evalsuite.task_config import GENERATED
from tinyllama.errors import UserError

TEXTS = ("", "A 1")  # a model may write nothing at all
LOG_PROBABILITY = -1.0
MOST_ITEMS = 100
FIX = "correct it"
# lm-eval's functions that run what a task brings, after inference.
SCORING = ("apply_filters", "process_results", "_compute_task_aggregations")


def of_scoring(error: BaseException) -> bool:
    """Whether an error was raised while lm-eval made scores of answers."""
    return any(
        frame.name in SCORING and "lm_eval" in frame.filename for frame in traceback.extract_tb(error.__traceback__)
    )


class AnswerChecks:
    """One task of the user's own, whose items were found to be right."""

    def __init__(self, task: Any) -> None:
        self.task, self.config, self.output_type = task, task.config, task.OUTPUT_TYPE
        self.docs = list(itertools.islice(task.task_docs, MOST_ITEMS))
        self.process_results = self.config.process_results if callable(self.config.process_results) else None

    def run(self) -> None:
        """UserError for a filter, or a process_results, that cannot make a score of an answer."""
        if self.output_type == GENERATED:
            answers: Sequence[Any] = TEXTS
        else:
            answers = [LOG_PROBABILITY if self.output_type == "loglikelihood_rolling" else (LOG_PROBABILITY, False)]
        for chain in self.task._filters:
            for answer in answers:
                found = self._filtered(chain, answer)
                if self.process_results is None:
                    self._check_kind(chain.name, answer, found[0])
                else:
                    self._try_scoring(answer, found[0])

    def _filtered(self, chain: Any, answer: Any) -> list[Any]:
        """What a chain of filters leaves of the same answer to every item."""
        where = f"task {self.config.task}: filter {chain.name}"
        found: list[Any] = [[answer] * max(1, self.config.repeats or 1) for _ in self.docs]
        for number, step in enumerate(chain.filters, 1):
            if isinstance(answer, str) and isinstance(found[0], str) and self.process_results is None:
                raise UserError(
                    f"{where}: its function {number} comes after take_first, and would take each letter for an answer",
                    fix="put take_first at the end",
                )
            try:
                found = list(step().apply(found, self.docs))
            except (Exception, SystemExit) as error:
                raise UserError(f"{where} fails for the answer {short(answer)}: {reason(error)}", fix=FIX) from error
            if len(found) != len(self.docs):
                raise UserError(f"{where} makes {len(found)} answers of {len(self.docs)}", fix=FIX)
        return found

    def _check_kind(self, chain: str, answer: Any, found: Any) -> None:
        """lm-eval's own metrics take one answer of the kind that the model gave."""
        of_functions = any(callable(metric.get("metric")) for metric in self.config.metric_list or [])
        if type(found) is type(answer) or of_functions:
            return
        where = f"task {self.config.task}: filter {chain}"
        if isinstance(found, list):
            raise UserError(f"{where} leaves a list of answers, and none is right", fix="end it with take_first")
        written = isinstance(answer, str)
        kind, fix = ("text", "give text as fallback, or default_value") if written else ("one", "leave the filter out")
        raise UserError(f"{where} makes {short(found)} of the answer {short(answer)}, which is not {kind}", fix=fix)

    def _try_scoring(self, answer: Any, found: Any) -> None:
        doc = self.docs[0]
        requests = len(self.task.doc_to_choice(doc)) if self.output_type == MULTIPLE_CHOICE else 1
        if self.output_type == MULTIPLE_CHOICE and "acc_mutual_info" in self.task._metric_fn_list:
            requests *= 2
        where = f"task {self.config.task}: process_results"
        try:
            scores = self.process_results(doc, [found] * requests)  # type: ignore[misc]
        except (Exception, SystemExit) as error:
            raise UserError(f"{where} fails for the answer {short(answer)}: {reason(error)}", fix=FIX) from error
        if not isinstance(scores, dict):
            raise UserError(f"{where} gives {short(scores)}, no mapping of metrics", fix=FIX)
        named = list(self.task.aggregation())
        if scores and named and not set(named) & set(scores):
            raise UserError(
                f"{where} gives {', '.join(map(str, scores))}, and metric_list names {', '.join(named)}",
                fix="use the same names",
            )
        self._check_scores(where, scores)

    def _check_scores(self, where: str, scores: dict[str, Any]) -> None:
        """A mean is one of numbers."""
        from lm_eval.api.metrics import mean

        aggregation = self.task.aggregation()
        for name, value in scores.items():
            if aggregation.get(name, mean) is mean and not isinstance(value, numbers.Number) and not _is_scalar(value):
                raise UserError(f"{where} gives {name} {short(value)}, which has no mean", fix="give a number")


def _is_scalar(value: Any) -> bool:
    """Whether it is one number of NumPy's or PyTorch's."""
    return getattr(value, "ndim", None) == 0
