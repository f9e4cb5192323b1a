"""Requests that no model can answer: refused in one line that names the task and the item, before anything is computed.

lm-eval's hf backend asserts the same of each request (a context, a continuation, and room for it), without saying which.
Scored all the same they would be the likeliest of all (nothing to get wrong: 0.0), or read another item's positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tinyllama.errors import UserError

SHOWN = 40  # characters of a text in a message


class NotNumbersError(UserError):
    """A model's log-probabilities are NaN or infinite."""


def refuse_unscorable(requests: Sequence[Any], longest: int, asked: Sequence[Any] = ()) -> None:
    """UserError for a ((context, continuation), context ids, continuation ids) that has no score of its own.

    longest: tokens that a continuation may have. asked: lm-eval's instances, in the order of the requests, which know their
    task and item.
    """
    bad = [
        index
        for index, (_, context, continuation) in enumerate(requests)
        if not context or not 0 < len(continuation) <= longest
    ]
    if not bad:
        return
    texts, _, continuation = requests[bad[0]]
    begins, text = texts or ("(a window of a longer text)", "(its end)")
    where = place(asked[bad[0]] if len(asked) == len(requests) else None)
    more = f" ({len(bad) - 1} more requests cannot be scored)" if len(bad) > 1 else ""
    if len(continuation) > longest:
        raise UserError(
            f"{where}the choice {shown(text)} has {len(continuation)} tokens, the context has room for {longest}{more}",
            fix="give a greater --max-length, use a model with a longer context, or leave the item out",
        )
    if not continuation:
        raise UserError(
            f"{where}the choice {shown(text)} after {shown(begins, last=True)} has no tokens of its own{more}",
            fix="no choice may be empty, or merge with the end of its context into one token",
        )
    raise UserError(
        f"{where}the context {shown(begins)} of {shown(text)} has no tokens{more}", fix="begin the context with a word"
    )


def refuse_tokenless(asked: Sequence[Any], encode: Callable[[str], list[int]]) -> None:
    """UserError for a choice without tokens after an empty context, whose first token lm-eval looks at unasked.

    encode: the tokens of a text, without any that the tokenizer adds.
    """
    for instance in asked:
        context, continuation = instance.args
        if context == "" and not encode(continuation):
            raise UserError(
                f"{place(instance)}the choice {shown(continuation)} has no tokens", fix="no choice may be empty"
            )


def refuse_beyond(ids: Sequence[int], vocabulary: int, instance: Any) -> None:
    """UserError for a token that a model does not have, though its tokenizer does."""
    if (largest := max(ids, default=0)) >= vocabulary:
        raise UserError(
            f"{place(instance)}the tokenizer gives token {largest}, the model has {vocabulary}",
            fix="use the tokenizer that the model was trained with",
        )


def refuse_empty_prompt(instance: Any, ids: Sequence[int]) -> None:
    """UserError for a prompt to continue that has no tokens."""
    if not len(ids):
        raise UserError(
            f"{place(instance)}the prompt {shown(instance.args[0])} has no tokens", fix="begin the prompt with a word"
        )


def refuse_not_numbers(scores: Sequence[tuple[float, bool]]) -> None:
    """NotNumbersError for NaN or infinity, of which lm-eval would take the first for the likeliest choice."""
    if not all(math.isfinite(score) for score, _ in scores):
        raise NotNumbersError(
            "the model's log-probabilities are not numbers",
            fix="check the model's weights for NaN; float16 overflows where bfloat16 and float32 do not (--dtype)",
        )


def place(instance: Any) -> str:
    """The beginning of a message on one of lm-eval's instances; "" for None, and for one that does not know its task."""
    name = getattr(instance, "task_name", None)
    if name is None:
        return ""
    return f"task {name}, item {getattr(instance, 'doc_id', '?')}: "


def shown(text: str, last: bool = False) -> str:
    """A text as a message quotes it: its beginning, or its end, in one line."""
    if len(text) <= SHOWN:
        return repr(text)
    return repr("..." + text[-SHOWN:]) if last else repr(text[:SHOWN] + "...")
