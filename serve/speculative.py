"""Speculative decoding: a draft proposes tokens, the model checks them all in one pass; the output stays the model's own.

A draft is a smaller model of the same vocabulary, or "ngram": the tokens that followed the same words earlier in the
prompt and the answer. Here are what vLLM is told, the check that the two models speak of the same tokens, and the share
of proposed tokens that was accepted, from vLLM's own counters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve import source as sources
from serve.source import Source
from tinyllama.errors import ConfigError

NGRAM = "ngram"
NGRAM_LONGEST = 4  # words of the past that are looked for, at most
MOST_TOKENS = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_at_position",
}


@dataclasses.dataclass(frozen=True)
class Draft:
    """What proposes `num_tokens` tokens at a time. source: None for ngram."""

    num_tokens: int
    source: Source | None

    def __str__(self) -> str:
        return f"{self.source.name if self.source else NGRAM} x{self.num_tokens}"

    def config(self) -> dict[str, Any]:
        """vLLM's speculative_config."""
        if self.source is None:
            return {"method": NGRAM, "num_speculative_tokens": self.num_tokens, "prompt_lookup_max": NGRAM_LONGEST}
        return {"method": "draft_model", "model": self.source.location, "num_speculative_tokens": self.num_tokens}

    def describe(self) -> dict[str, Any]:
        """The part of bench.json's settings that says what was drafted with."""
        described = self.source.describe() if self.source else {}
        return {
            "method": "draft_model" if self.source else NGRAM,
            "num_tokens": self.num_tokens,
            "name": self.source.name if self.source else NGRAM,
            **{key: described.get(key) for key in ("path", "content_sha256", "num_parameters")},
        }


def resolve(given: str, num_tokens: int, target: Source, report: Callable[[str], None]) -> Draft:
    """What --draft names, checked against the target; ConfigError or UserError for what cannot be."""
    if not 1 <= num_tokens <= MOST_TOKENS:
        raise ConfigError(f"--draft-tokens {num_tokens}", fix=f"give 1 to {MOST_TOKENS}; 3 to 5 are usual")
    if given == NGRAM:
        return Draft(num_tokens, None)
    draft = sources.resolve(given, report, "--draft")
    check_vocabulary(target, draft)
    return Draft(num_tokens, draft)


def check_vocabulary(target: Source, draft: Source) -> None:
    """ConfigError unless the ids of both models mean the same, as far as their files are here."""
    mine, theirs = target.config.get("vocab_size"), draft.config.get("vocab_size")
    if mine != theirs:
        raise ConfigError(
            f"--draft {draft.name} has a vocabulary of {theirs} tokens, {target.name} one of {mine}",
            fix="give a draft that was trained with the same tokenizer, or --draft ngram",
        )
    for name in TOKENIZER_FILES:
        first, second = Path(target.location) / name, Path(draft.location) / name
        if first.exists() and second.exists():
            if _pieces(first) != _pieces(second):
                raise ConfigError(
                    f"--draft {draft.name} has another tokenizer than {target.name}: {second} differs from {first}",
                    fix="give a draft that was trained with the same tokenizer, or --draft ngram",
                )
            return


def _pieces(file: Path) -> Any:
    """What decides the ids in a tokenizer file: its pieces, merges and added tokens, or all of its bytes."""
    if file.suffix != ".json":
        return file.read_bytes()
    try:
        tokenizer = json.loads(file.read_text())
        model = tokenizer["model"]
        return model["vocab"], model.get("merges"), [(t["id"], t["content"]) for t in tokenizer["added_tokens"]]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} is no tokenizer", fix="export the model again") from None


def count(metrics: Sequence[Any]) -> dict[str, Any]:
    """vLLM's counters so far, summed over its engines: drafts, tokens drafted, accepted, accepted at each position."""
    found: dict[str, Any] = dict.fromkeys(COUNTERS.values(), 0) | {"accepted_at_position": []}
    for metric in metrics:
        name = COUNTERS.get(metric.name)
        if name == "accepted_at_position":
            before = found[name] or [0] * len(metric.values)
            found[name] = [a + b for a, b in zip(before, metric.values, strict=True)]
        elif name:
            found[name] += metric.value
    return found


def acceptance(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What was drafted and accepted between two counts.

    acceptance_rate: accepted of all drafted tokens. tokens_per_step: accepted ones and the one that the model itself
    adds. at_position: share of the drafts whose first, second, ... token was accepted. None where nothing was drafted.
    """
    drafts, drafted, accepted = (
        after[name] - before[name] for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    old = before["accepted_at_position"] or [0] * len(after["accepted_at_position"])
    positions = [b - a for a, b in zip(old, after["accepted_at_position"], strict=True)]
    return {
        "num_drafts": drafts,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_step": 1 + accepted / drafts if drafts else None,
        "at_position": [number / drafts for number in positions] if drafts else None,
    }


def line(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """One line for people."""
    what = f"drafts of {settings['num_tokens']} tokens by {settings['name']}"
    if found["acceptance_rate"] is None:
        return f"Speculative decoding, {what}: nothing was drafted."
    return (
        f"Speculative decoding, {what}: {100 * found['acceptance_rate']:.0f}% of the drafted tokens accepted, "
        f"{found['tokens_per_step']:.2f} tokens for each pass of the model."
    )
