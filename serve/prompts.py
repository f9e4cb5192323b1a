"""What a measurement sends: random ids, or windows of a text, always of an exact number of tokens.

Random ids are the same load for every model, and nothing that anyone would write: whether a draft guesses right, or
which n-grams repeat, can only be seen on text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

from tinyllama.errors import UserError


def random_ids(rng: random.Random, batch_size: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of exactly `tokens` ids; the first three ids (unknown, begin, end) are left out if there are more."""
    first = 3 if vocab_size > 3 else 0
    return [[rng.randrange(first, vocab_size) for _ in range(tokens)] for _ in range(batch_size)]


def windows(rng: random.Random, batch_size: int, tokens: int, ids: list[int]) -> list[list[int]]:
    """`batch_size` windows of `tokens` neighbouring ids, each from a random place."""
    starts = [rng.randrange(len(ids) - tokens + 1) for _ in range(batch_size)]
    return [ids[start : start + tokens] for start in starts]


def read_text(file: str) -> str:
    """The text of --prompts; UserError if it cannot be read."""
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file} cannot be read ({error})", fix="give a text file in UTF-8") from None


def sha256(file: str) -> str:
    """Of the text of --prompts."""
    return hashlib.sha256(read_text(file).encode()).hexdigest()


def encode(file: str, encoder: Callable[[str], list[int]], tokens: int) -> list[int]:
    """The ids of --prompts; UserError if they are fewer than one prompt needs."""
    ids = encoder(read_text(file))
    if len(ids) < tokens:
        raise UserError(f"--prompts {file} has {len(ids)} tokens, a prompt {tokens}", fix="give a longer text")
    return ids
