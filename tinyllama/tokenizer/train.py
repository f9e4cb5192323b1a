"""Trains a SentencePiece BPE with Llama 2's settings.

The settings are those in the trainer spec of Llama 2's own tokenizer.model (a test compares them); only the vocabulary
and what bounds the work differ.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllama.data.documents import find_inputs, read_documents
from tinyllama.errors import MissingExtraError, UserError

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
MAX_LINE_BYTES = 65536  # longer lines (minified code, base64) are left out, as sentencepiece itself does


def lines(documents: Iterable[str]) -> Iterator[str]:
    """The lines of documents, without their ends: a newline is a byte piece in Llama's vocabulary, never learnt."""
    for document in documents:
        for line in document.splitlines():
            if line:
                yield line


def _without_threads(model: bytes) -> bytes:
    """The model without the number of threads that sentencepiece notes in it: the file depends on the text alone."""
    from sentencepiece import sentencepiece_model_pb2

    proto = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - made when imported
    proto.ParseFromString(model)
    proto.trainer_spec.ClearField("num_threads")
    return proto.SerializeToString()


def train(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    vocab_size: int,
    *,
    input_sentence_size: int = 10_000_000,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train on the documents of `inputs` and write the model to `output`, atomically. Deterministic.

    input_sentence_size: at most so many lines, sampled, are held in memory. progress: called with the bytes of each
    document read. UserError if the corpus cannot support `vocab_size` pieces.
    """
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtraError("sentencepiece", "data") from None
    files = find_inputs(inputs)
    if vocab_size < 300:
        raise UserError(f"--vocab-size {vocab_size}", fix="256 bytes and 3 control pieces come first; give 300 or more")
    target = Path(output)
    seen = 0

    def documents() -> Iterator[str]:
        nonlocal seen
        for file in files:
            for text in read_documents(file):
                seen += 1
                if progress:
                    progress(len(text.encode()))
                yield text

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(documents()),
            model_writer=model,
            vocab_size=vocab_size,
            input_sentence_size=input_sentence_size,
            shuffle_input_sentence=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=num_threads or os.cpu_count() or 1,
            minloglevel=2,
            **LLAMA_SETTINGS,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        fix = f"this corpus supports at most {limit.group(1)}" if limit else "give more text or a smaller vocabulary"
        raise UserError(
            f"--vocab-size {vocab_size} does not fit this corpus ({str(error).splitlines()[0]})", fix=fix
        ) from None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_bytes(_without_threads(model.getvalue()))
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror})", fix="give a writable --output") from None
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer

    loaded = Tokenizer.load(target)
    return {"path": str(target), "sha256": loaded.sha256, "vocab_size": loaded.vocab_size, "documents": seen}
