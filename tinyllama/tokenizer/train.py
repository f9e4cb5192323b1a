"""Trains a SentencePiece BPE with Llama 2's settings.

The settings are those in the trainer spec of Llama 2's own tokenizer.model (a test compares them); only the vocabulary
and what bounds the work differ. The model depends on the text, the vocabulary's size, the sample's size and the seed:
not on threads, paths or time.
"""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllama.data.documents import read_documents
from tinyllama.data.durable import cannot_write, durable, refuse_unwritable
from tinyllama.data.inputs import find_inputs
from tinyllama.errors import DataError, UserError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer, library, parse

LLAMA_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "treat_whitespace_as_suffix": False,
    "allow_whitespace_only_pieces": True,
    "max_sentencepiece_length": 16,
    "character_coverage": 0.99995,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
MAX_LINE_BYTES = 65536  # longer lines (minified code, base64) are left out; Llama's limit of 4192 loses prose as well
INPUT_LINES = 10_000_000


def lines(documents: Iterable[str]) -> Iterator[str]:
    """The lines of documents, without the newline, which is a byte piece in Llama's vocabulary and never learnt.

    Only "\\n" ends a line, as when SentencePiece reads a file: Llama's vocabulary has pieces such as ";\\r".
    Indentation stays, and is learnt as runs of spaces.
    """
    for document in documents:
        for line in document.split("\n"):
            if line and (len(line) * 4 <= MAX_LINE_BYTES or len(line.encode()) <= MAX_LINE_BYTES):
                yield line


def sample(items: Iterable[str], size: int, seed: int) -> list[str]:
    """At most `size` of the items, each as likely as any other (Vitter's algorithm R); all of them if they fit.

    SentencePiece has a sampler of its own, whose seed cannot be set.
    """
    generator = random.Random(seed)
    kept: list[str] = []
    for number, item in enumerate(items):
        if number < size:
            kept.append(item)
        elif (place := int(generator.random() * (number + 1))) < size:
            kept[place] = item
    return kept


def _drain(kept: list[str]) -> Iterator[str]:
    """The items, each let go once it is handed over: SentencePiece makes a copy."""
    kept.reverse()
    while kept:
        yield kept.pop()


def _without_threads(model: bytes) -> bytes:
    """The model without the number of threads that sentencepiece notes in it: the file depends on the text alone."""
    proto = parse(model)
    proto.trainer_spec.ClearField("num_threads")
    return proto.SerializeToString()


def _misfit(vocab_size: int, message: str) -> UserError | None:
    """What SentencePiece's complaint about the vocabulary's size means for a user; None for any other complaint."""
    if limit := re.search(r"value <= (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too large for this corpus", fix=f"it supports at most {limit.group(1)}"
        )
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size} is too small for the characters of this corpus",
            fix=f"it needs at least {limit.group(1)}",
        )
    return None


def _learn(kept: list[str], vocab_size: int, num_threads: int) -> bytes:
    """The model that SentencePiece learns from these lines; the list is emptied. UserError if the size does not fit."""
    model = io.BytesIO()
    try:
        library().SentencePieceTrainer.train(
            sentence_iterator=_drain(kept),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=num_threads,
            minloglevel=2,
            **LLAMA_SETTINGS,
        )
    except RuntimeError as error:
        misfit = _misfit(vocab_size, str(error))
        if misfit is None:
            raise
        raise misfit from None
    except ValueError as error:
        raise UserError(f"--vocab-size {vocab_size}, --threads {num_threads} ({error})", fix="give less") from None
    return _without_threads(model.getvalue())


def train(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    vocab_size: int,
    *,
    input_sentence_size: int = INPUT_LINES,
    seed: int = 0,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    learning: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train on the documents of `inputs` and write the model to `output`, atomically. Deterministic.

    input_sentence_size: at most so many lines, sampled with `seed`, are held in memory and learnt from. progress:
    called with the bytes of each document read; learning: once, when reading is done. Returns path, sha256, vocab_size
    and the number of documents and lines. UserError if the corpus cannot support `vocab_size` pieces, DataError for
    bad input.
    """
    if vocab_size < 260:
        raise UserError(f"--vocab-size {vocab_size}", fix="256 bytes and 3 control pieces come first; give 260 or more")
    if input_sentence_size < 1:
        raise UserError(f"--max-lines {input_sentence_size}", fix="give 1 or more")
    if num_threads is not None and num_threads < 1:
        raise UserError(f"--threads {num_threads}", fix="give 1 or more")
    files = find_inputs(inputs)
    target = Path(output)
    library()  # missing, or nowhere to write to: said before hours of reading
    refuse_unwritable(target)
    seen = 0

    def documents() -> Iterator[str]:
        nonlocal seen
        for file in files:
            for text in read_documents(file):
                seen += 1
                if progress:
                    progress(len(text.encode()))
                yield text

    # Read before SentencePiece starts: an error in here would reach the user as one of SentencePiece's.
    kept = sample(lines(documents()), input_sentence_size, seed)
    num_lines = len(kept)
    if not kept:
        raise DataError(f"{', '.join(map(str, inputs))}: no text in {seen} documents", fix="give files with text")
    if learning:
        learning()
    content = _learn(kept, vocab_size, num_threads or os.cpu_count() or 1)
    try:
        with durable(target, "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise cannot_write(error, target) from None
    loaded = Tokenizer(target, content)
    return {
        "path": str(target),
        "sha256": loaded.sha256,
        "vocab_size": loaded.vocab_size,
        "documents": seen,
        "lines": num_lines,
    }
