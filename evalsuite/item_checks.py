"""Tries each item of a task on the task's templates: a user's own rows, and the rows that are shown as examples.

What lm-eval would fail with after the model has answered, or warn about where nobody sees it (a label beside the choices),
is told here in one line with the file and the line of the row. Shots that show an item its own answer are refused too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalsuite.names import short
from evalsuite.rows import Rows
from evalsuite.task_config import GENERATED, HANDED_ON, METRICS
from tinyllama.errors import UserError

TEMPLATES = 1024  # kept compiled
MULTIPLE_CHOICE = "multiple_choice"
# Metrics of generated text that are computed over all items at the end, from one answer of each.
OF_ONE_ANSWER = {*METRICS[GENERATED], *HANDED_ON[GENERATED]} - {"exact_match"}


def reason(error: BaseException) -> str:
    """An exception in one line, with the place in a Python file of the user's own."""
    import lm_eval

    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    others = [Path(lm_eval.__file__).parent.parent, Path(__file__).parent, Path(sys.prefix), Path(sys.base_prefix)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.suffix == ".py" and path.exists() and not any(folder in path.parents for folder in others):
            return f"{type(error).__name__} in {path}:{frame.lineno}: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@functools.cache
def _strict() -> Any:
    """lm-eval's templates, but they refuse to print what is no text, number, list or mapping: null as "None", say."""
    from jinja2 import BaseLoader, Environment, StrictUndefined
    from lm_eval.utils import env

    def printed(value: Any) -> Any:
        if value is None or (isinstance(value, float) and not math.isfinite(value)) or isinstance(value, bytes):
            raise ValueError(f"{'null' if value is None else short(value)} would be printed")
        return value

    found = Environment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True, finalize=printed)
    found.filters.update(env.filters)
    return found


@functools.lru_cache(TEMPLATES)
def _compiled(template: str) -> Any:
    return _strict().from_string(template)


@functools.lru_cache(TEMPLATES)
def _fields(template: str) -> frozenset[str]:
    """The fields of a row that a template names."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_strict().parse(template)))


def _is_floated(given: Any, read: Any) -> bool:
    """Whether a whole number, somewhere in what a row gave, was read as a float."""
    if isinstance(read, list) and isinstance(given, list):
        return any(map(_is_floated, given, read))
    if isinstance(read, dict) and isinstance(given, dict):
        return any(_is_floated(inner, read.get(name)) for name, inner in given.items())
    return isinstance(read, float) and isinstance(given, int)


class _WrongError(Exception):
    """What is wrong with an item: the key of the definition, and the reason."""

    def __init__(self, key: str, why: str) -> None:
        self.key, self.why = key, why
        super().__init__(f"{key}: {why}")


@dataclasses.dataclass(frozen=True)
class Item:
    """An item as it is asked: text or the number of a choice, choices, target."""

    text: Any
    choices: tuple[str, ...] | None
    target: Any

    @property
    def shown(self) -> str:
        """What a shot shows of it; equal for two rows that differ in what no template reads."""
        return repr((self.text, self.choices, self.target))

    @property
    def question(self) -> str:
        """The same without the answer."""
        return repr((self.text, self.choices))


class ItemChecks:
    """The items of one task of the user's own, and its shots. tables: the rows by split."""

    def __init__(self, task: Any, tables: dict[str, Rows]) -> None:
        self.task, self.config, self.tables = task, task.config, tables
        self.output_type = task.OUTPUT_TYPE
        self.split = self.config.test_split or self.config.validation_split
        self.metrics = set(task._metric_fn_list)

    def run(self) -> None:
        """UserError for the first item, or shot, that means nothing."""
        items = self.items()
        if self.task.get_config("num_fewshot"):
            self._check_shots(list(self.task.task_docs), items)

    def items(self) -> list[Item]:
        """The items that are asked; UserError for the first that means nothing."""
        docs = list(self.task.task_docs)
        if not docs:
            raise UserError(f"{self.tables[self.split].path}: process_docs leaves no rows", fix="correct it")
        items = [self._item(doc, self.split, index, self.config.process_docs) for index, doc in enumerate(docs)]
        listed, numbered = isinstance(items[0].target, list), isinstance(items[0].text, int)
        for index, item in enumerate(items):
            if isinstance(item.text, int) != numbered:
                kinds = ("text", "a number") if numbered else ("a number", "text")
                error = _WrongError(
                    "doc_to_text", f"{short(item.text)} is {kinds[0]}, that of the first item {kinds[1]}"
                )
                raise self._error(self.split, index, self.config.process_docs, error)
            if isinstance(item.target, list) != listed and not callable(self.config.process_results):
                kinds = ("no list", "a list") if listed else ("a list", "no list")
                error = _WrongError(
                    "doc_to_target", f"{short(item.target)} is {kinds[0]}, that of the first item {kinds[1]}"
                )
                raise self._error(self.split, index, self.config.process_docs, error)
        return items

    def labels(self, limit: int | None) -> None:
        """UserError for the first item whose label is none of its choices."""
        for index, doc in enumerate(itertools.islice(self.task.task_docs, limit)):
            target, choices = self.task.doc_to_target(doc), self.task.doc_to_choice(doc)
            if isinstance(target, int) and 0 <= target < len(choices):
                continue
            try:
                self._check_target(target, choices, doc)
            except _WrongError as error:
                raise self._error(self.split, index, self.config.process_docs, error) from None

    @property
    def _name(self) -> str:
        return f"task {self.config.task}"

    def _place(self, split: str | None, index: int, process_docs: Any) -> str:
        if split is None:
            return f"{self._name}: fewshot_config.samples, {index + 1}"
        if split not in self.tables:
            files = (self.config.dataset_kwargs or {}).get("data_files") or {}
            if isinstance(files, dict) and isinstance(files.get(split), str) and process_docs is None:
                return f"{files[split]}: row {index + 1}"
            return f"{self._name}: item {index + 1} of {split}"
        if process_docs is not None:
            return f"{self.tables[split].path}: item {index + 1} after process_docs"
        return self.tables[split].place(index)

    def _error(self, split: str | None, index: int, process_docs: Any, error: _WrongError) -> UserError:
        value = getattr(self.config, error.key, None)
        field = f" ({short(value)})" if isinstance(value, str) and error.key.startswith("doc_to") else ""
        return UserError(
            f"{self._place(split, index, process_docs)}: {error.key}{field}: {error.why}",
            fix="correct the row or the task",
        )

    def _item(self, doc: dict[str, Any], split: str | None, index: int, process_docs: Any) -> Item:
        """An item, checked."""
        try:
            text = self._value("doc_to_text", self.task.doc_to_text, doc) if self._has_text else ""
            choices = self._choices(doc)
            target = self._value("doc_to_target", self.task.doc_to_target, doc)
            self._check_text(text, choices)
            self._check_target(target, choices, doc)
            self._check_equal_choices(target, choices)
            self._description(doc)
            if process_docs is None and split in self.tables:
                self._check_numbers(self.tables[split].rows[index], doc)
        except _WrongError as error:
            raise self._error(split, index, process_docs, error) from None
        return Item(text, None if choices is None else tuple(choices), target)

    def _check_numbers(self, row: dict[str, Any], doc: dict[str, Any]) -> None:
        """In a field that has fractions in other rows a whole number is a float64 in the table: 3 would be asked as 3.0."""
        for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
            template = getattr(self.config, key)
            if isinstance(template, str):
                named = {template} if template in self.task.features else _fields(template)
                for name in sorted(named):
                    if _is_floated(row.get(name), doc.get(name)):
                        why = f"field {name}: {short(row[name])} is asked as {short(doc[name])}, for other rows have"
                        raise _WrongError(key, f"{why} fractions; give text in all rows")

    @property
    def _has_text(self) -> bool:
        return self.config.doc_to_text is not None

    def _value(self, key: str, call: Any, doc: dict[str, Any]) -> Any:
        """What lm-eval makes of a definition's key for a row."""
        from jinja2 import TemplateSyntaxError

        template = getattr(self.config, key)
        is_template = isinstance(template, str) and template not in self.task.features
        try:
            if is_template:
                _compiled(template).render(**doc)
            return call(doc)
        except (Exception, SystemExit) as error:  # of the user's own functions and templates
            named = (
                _fields(template) if is_template and not isinstance(error, SyntaxError | TemplateSyntaxError) else ()
            )
            empty = sorted(name for name in named if doc.get(name) is None)
            why = f"field {', '.join(empty)} is empty or missing" if empty else reason(error)
            if isinstance(error, SyntaxError) and is_template and key != "doc_to_choice":
                # 007, or digits of another script, which are no literals
                why = "digits alone are taken for a number, and these are none: add words to the template"
            raise _WrongError(key, why) from None

    def _description(self, doc: dict[str, Any]) -> None:
        for key in ("description", "gen_prefix"):
            template = getattr(self.config, key)
            if isinstance(template, str) and template:
                self._value(key, lambda doc: None, doc)

    def _choices(self, doc: dict[str, Any]) -> list[str] | None:
        if self.config.doc_to_choice is None:
            return None
        choices = self._value("doc_to_choice", self.task.doc_to_choice, doc)
        if not isinstance(choices, list):
            raise _WrongError("doc_to_choice", f"{short(choices)} is not a list")
        if len(choices) < 2:
            raise _WrongError("doc_to_choice", f"{short(choices)} is no choice: give two or more")
        for number, choice in enumerate(choices):
            if not isinstance(choice, str):
                fix = ", put it in quotes" if isinstance(choice, bool | int | float) else ""
                raise _WrongError("doc_to_choice", f"choice {number}, {short(choice)}, is not text{fix}")
            if not choice.strip():
                raise _WrongError("doc_to_choice", f"choice {number} is empty")
        if "f1" in self.metrics and len(choices) > 2:
            raise _WrongError("doc_to_choice", f"{len(choices)} choices: f1 is for two")
        return choices

    def _check_text(self, text: Any, choices: Sequence[str] | None) -> None:
        template = self.config.doc_to_text
        if isinstance(text, int) and not isinstance(text, bool) and choices is not None:
            if not 0 <= text < len(choices):  # the choices are the texts, and this says which of them is right
                raise _WrongError("doc_to_text", f"the text is the number {text}, taken as a choice's: add words to it")
        elif not isinstance(text, str):
            raise _WrongError("doc_to_text", f"{short(text)} is not text")
        elif not text.strip() and isinstance(template, str) and template.strip():
            raise _WrongError("doc_to_text", "the text is empty")

    def _check_target(self, target: Any, choices: Sequence[str] | None, doc: dict[str, Any]) -> None:
        if self.output_type == MULTIPLE_CHOICE and not self._is_numbered(doc):
            assert choices is not None
            if isinstance(target, list):
                if not target:
                    raise _WrongError("doc_to_target", "no label")
                for label in target:
                    self._check_label(label, choices, doc, False)
            else:
                self._check_label(target, choices, doc, True)
            return
        if target is None:
            raise _WrongError("doc_to_target", "null")
        constant = not isinstance(self.config.doc_to_target, str) or not self.config.doc_to_target.strip()
        if (
            isinstance(target, str)
            and not target.strip()
            and not constant
            and not callable(self.config.process_results)
        ):
            raise _WrongError("doc_to_target", "the text is empty")
        if self.output_type.startswith("loglikelihood") and not isinstance(target, str):
            raise _WrongError("doc_to_target", f"{short(target)} is not text")
        if self.output_type == GENERATED and choices is not None:
            self._check_label(target, choices, doc, False)
        elif self.output_type == GENERATED and not callable(self.config.process_results):
            self._check_answer(target)

    def _check_answer(self, target: Any) -> None:
        """Of generated text: the answer, or a list of answers of which one is wanted, as it is compared."""
        if not isinstance(target, list):
            return
        if not target:
            raise _WrongError("doc_to_target", "the list of answers is empty")
        for answer in target:
            if not isinstance(answer, str):
                raise _WrongError("doc_to_target", f"answer {short(answer)} is not text, and no text is equal to it")
        if summed := sorted(self.metrics & OF_ONE_ANSWER):
            raise _WrongError("doc_to_target", f"a list of answers, and {summed[0]} is for one")

    def _check_equal_choices(self, target: Any, choices: Sequence[str] | None) -> None:
        """Of two equal choices lm-eval takes the first: a label that means the second could never be right."""
        if self.output_type == MULTIPLE_CHOICE and choices is not None and isinstance(target, int):
            first = choices.index(choices[target]) if 0 <= target < len(choices) else target
            if first != target and not callable(self.config.process_results):
                raise _WrongError("doc_to_target", f"label {target}, and choice {first} is the same text")

    def _is_numbered(self, doc: dict[str, Any]) -> bool:
        return isinstance(self.task.doc_to_text(doc), int) if self._has_text else False

    def _check_label(self, label: Any, choices: Sequence[str], doc: dict[str, Any], text: bool) -> None:
        """text: whether a choice's text is a label too."""
        if isinstance(label, int):
            if not 0 <= label < len(choices):
                raise _WrongError("doc_to_target", f"label {label}, and the choices are 0 to {len(choices) - 1}")
            plain = [choice.strip().lower() for choice in choices]
            if isinstance(label, bool) and str(label).lower() in plain and plain[label] != str(label).lower():
                # True stands for 1, and False for 0.
                raise _WrongError("doc_to_target", f"label {label} is choice {int(label)}, {short(choices[label])}")
            template = self.config.doc_to_target
            if isinstance(template, str) and template not in self.task.features and str(label) in choices:
                raw = [doc[name] for name in _fields(template) if name in doc]
                if choices[label] != str(label) and not any(type(value) is int for value in raw):
                    raise _WrongError("doc_to_target", f"label {label} is a choice's number and another choice's text")
        elif label is None:
            raise _WrongError("doc_to_target", "the label is empty or missing")
        elif not isinstance(label, str) or not text:
            raise _WrongError("doc_to_target", f"label {short(label)} is not a choice's number")
        elif label not in choices:
            raise _WrongError("doc_to_target", f"label {short(label)} is none of the choices, {short(list(choices))}")

    # The rows that are shown with their answers.

    def _check_shots(self, docs: list[Any], items: list[Item]) -> None:
        config, shots = self.config, int(self.task.get_config("num_fewshot"))
        settings = self.task.fewshot_cfg
        split = settings.split
        process_docs = settings.process_docs if split is not None else config.process_docs
        if split is None and settings.samples is None:
            split = config.training_split or config.validation_split or config.test_split
        pool = list(self.task.sampler.df)
        left_out = settings.split == config.test_split  # lm-eval's rule for leaving the item out of its shots
        if split == self.split and not (left_out and settings.split is not None):
            fix = f"add fewshot_split: {split}, which leaves it out, or give a split for the shots"
            if config.test_split is None:
                fix = "name it as test_split and fewshot_split, which leaves it out, or give a split for the shots"
            raise UserError(f"{self._name}: shots from {split}, which is asked: an item could be its own shot", fix=fix)
        needed = shots + left_out
        where = self.tables[split].path if split in self.tables else self._name
        if len(pool) < needed:
            more = " besides the item itself" if split == self.split else ""
            raise UserError(f"{where}: {len(pool)} rows, and {shots} shots are asked for{more}", fix="ask for fewer")
        if type(self.task.sampler).__name__ == "FirstNSampler":
            pool = pool[:needed]
        self._refuse_equal(split, process_docs, pool, docs, items, left_out)

    def _refuse_equal(
        self, split: str | None, process_docs: Any, pool: list[Any], docs: list[Any], items: list[Item], left_out: bool
    ) -> None:
        """UserError for two equal shots, or one that is an item which is not left out."""
        shown: dict[str, int] = {}
        questions: dict[str, list[int]] = {}
        for index, doc in enumerate(pool):
            shot = self._item(doc, split, index, process_docs)
            first = shown.setdefault(shot.shown, index)
            if first != index:
                places = [self._place(split, number, process_docs) for number in (index, first)]
                raise UserError(f"{places[0]}: the same as {places[1]}, and both are shots", fix="keep one of them")
            questions.setdefault(shot.question, []).append(index)
        for index, item in enumerate(items):
            for number in questions.get(item.question, []):
                if not (left_out and pool[number] == docs[index]):
                    places = [self._place(self.split, index, self.config.process_docs)]
                    places.append(self._place(split, number, process_docs))
                    raise UserError(
                        f"{places[0]}: the item is also the shot {places[1]}", fix="keep it in one of the two"
                    )
