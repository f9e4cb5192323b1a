"""The tokenizer in a Hugging Face directory: whether there is one, whole, and of the model's vocabulary. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError, first_line
from tinyllama.model import stored

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "vocab.bpe",
)  # fmt: skip
WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # bytes are their vocabulary
SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check(directory: Path, vocab_size: int | None) -> None:
    """Refuse a directory without a tokenizer, with a damaged one, or with one of a larger vocabulary than the model's.

    tokenizer.json and the small files beside it are read; of others only that they have content.
    """
    settings = {name: stored.read_object(directory / name) for name in SETTINGS if os.path.lexists(directory / name)}
    present = [name for name in TOKENIZERS if os.path.lexists(directory / name)]
    kind = settings.get("tokenizer_config.json", {}).get("tokenizer_class")
    if not present and kind not in WITHOUT_FILES:
        raise ConfigError(
            f"{directory} has no tokenizer (neither tokenizer.json nor tokenizer.model)",
            fix="export the model again, or save its tokenizer there",
        )
    for name in present:
        stored.checked_size(directory / name)
    if "tokenizer.json" not in present:
        return
    path = directory / "tokenizer.json"
    model = stored.read_object(path).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise ConfigError(f"{path} is no tokenizer: it has no vocabulary", fix="save the model's tokenizer there")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    if not all(type(number) is int for number in ids):
        raise ConfigError(f"{path}: an id of its vocabulary is no number", fix="save the model's tokenizer there")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise ConfigError(
            f"{path} has ids up to {max(ids)}, the model's vocab_size is {vocab_size}",
            fix="save the tokenizer there that the model was trained with",
        )


def load(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a directory, as transformers makes it. ConfigError, whatever is wrong with its files."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # those of tokenizers have no other base
        raise ConfigError(
            f"{directory}: transformers cannot read its tokenizer ({first_line(error)[:200]})",
            fix="save the tokenizer there that the model was trained with",
        ) from error
