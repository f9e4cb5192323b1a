"""Trains a SentencePiece BPE with Llama 2's settings.

The settings are those in the trainer spec of Llama 2's own tokenizer.model (a test compares them); only the vocabulary
and what bounds the work differ. The model depends on the text, the vocabulary's size, the sample's size and the seed:
not on threads, paths or time.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllama.data.addresses import shown
from tinyllama.data.documents import Reader
from tinyllama.data.durable import cannot_write, durable, refuse_existing, refuse_unwritable
from tinyllama.data.inputs import LeftOut, empty_line, find_inputs, left_out_line
from tinyllama.errors import DataError, UserError
from tinyllama.tokenizer.learner import LearnerError, learn
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
MAX_LINE_BYTES = 65536  # of what SentencePiece is given at once; longer lines (minified code, base64) are cut
INPUT_LINES = 10_000_000
RESERVED = "\u2585"  # SentencePiece leaves out every line with this character, which is its own mark inside
# Where a line that is too long is cut, the latest first; at a space if it has one.
_SPACES = tuple(c.encode() for c in "\t\r\x0b\x0c\x85\xa0\u2002\u2003\u2009\u2028\u2029\u3000")


@dataclasses.dataclass
class Coverage:
    """What became of every byte of the documents: read = line_ends + reserved + sampled_out + used."""

    read: int = 0
    line_ends: int = 0
    reserved: int = 0
    sampled_out: int = 0
    cut_lines: int = 0
    cut_lines_bytes: int = 0

    @property
    def used(self) -> int:
        return self.read - self.line_ends - self.reserved - self.sampled_out

    def to_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "used": self.used}


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def pieces_of(line: str) -> list[str]:
    """A line as parts of at most MAX_LINE_BYTES, cut at a space (which each part begins with anyway), else at other white
    space, else between two characters.
    """
    if len(line) * 4 <= MAX_LINE_BYTES:
        return [line]
    data, start, found = line.encode(), 0, []
    while len(data) - start > MAX_LINE_BYTES:
        limit = start + MAX_LINE_BYTES
        end = data.rfind(b" ", start + 1, limit + 1)
        following = end + 1
        if end < 0:
            cuts = (data.rfind(space, start, limit) + len(space) for space in _SPACES if space in data[start:limit])
            end = max(cuts, default=0)
            if not end:
                end = limit
                while data[end] & 0xC0 == 0x80:
                    end -= 1
            following = end
        found.append(data[start:end].decode())
        start = following
    return [*found, data[start:].decode()]


def lines(documents: Iterable[str], coverage: Coverage | None = None) -> Iterator[str]:
    """The lines of documents, without the newline, which is a byte piece in Llama's vocabulary and never learnt.

    Only "\\n" ends a line, as when SentencePiece reads a file: Llama's vocabulary has pieces such as ";\\r". Indentation
    stays, and is learnt as runs of spaces. Every byte that is not given is counted in `coverage`.
    """
    counts = Coverage() if coverage is None else coverage
    for document in documents:
        num_bytes = _utf8_bytes(document)
        counts.read += num_bytes
        given = 0
        for whole in document.split("\n"):
            parts = pieces_of(whole)
            if len(parts) > 1:
                counts.cut_lines += 1
                counts.cut_lines_bytes += len(whole.encode())
                given += len(whole.encode()) - sum(len(part.encode()) for part in parts)  # the spaces between them
            for part in parts:
                if RESERVED in part:
                    counts.reserved += len(RESERVED.encode()) * part.count(RESERVED)
                    given += len(RESERVED.encode()) * part.count(RESERVED)
                for line in part.split(RESERVED) if RESERVED in part else (part,):
                    # SentencePiece takes carriage returns at the end of a line for its end.
                    if text := line.rstrip("\r"):
                        given += _utf8_bytes(text)
                        yield line
        counts.line_ends += num_bytes - given


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


def _drain(kept: list[str]) -> Iterator[bytes]:
    """The items in UTF-8, each let go once it is handed over: SentencePiece makes a copy."""
    kept.reverse()
    while kept:
        yield kept.pop().encode()


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
    """The model that SentencePiece learns from these lines; the list is emptied. UserError if it cannot."""
    settings = {
        **LLAMA_SETTINGS,
        "vocab_size": vocab_size,
        "max_sentence_length": MAX_LINE_BYTES,
        "num_threads": num_threads,
    }
    try:
        return _without_threads(learn(_drain(kept), settings))
    except LearnerError as error:
        reason = " ".join(str(error).split())
        raise _misfit(vocab_size, reason) or UserError(
            f"SentencePiece cannot learn {vocab_size} pieces on {num_threads} threads from these documents ({reason})",
            fix="give more text, a smaller --vocab-size, or less at once: --max-lines",
        ) from None


class _Skipped(list[tuple[int, str]]):
    """Counts the records that a reader leaves out, by reason."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def append(self, entry: tuple[int, str]) -> None:
        self.counts["empty" if entry[1] == "empty" else entry[1].partition(" (")[0]] += 1


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
    notice: Callable[[str], None] | None = None,
    overwrite: bool = True,
) -> dict[str, Any]:
    """Train on the documents of `inputs` and write the model to `output`, atomically. Deterministic.

    input_sentence_size: at most so many lines, sampled with `seed`, are held in memory and learnt from. progress:
    called with the bytes of each document read; learning: once, when reading is done; notice: told of files that were
    left out. Returns path, sha256, vocab_size, the number of documents and lines, what became of the bytes, and which
    records were skipped. UserError if the corpus cannot support `vocab_size` pieces, DataError for bad input.
    """
    if vocab_size < 260:
        raise UserError(f"--vocab-size {vocab_size}", fix="256 bytes and 3 control pieces come first; give 260 or more")
    if input_sentence_size < 1:
        raise UserError(f"--max-lines {input_sentence_size}", fix="give 1 or more")
    if num_threads is not None and num_threads < 1:
        raise UserError(f"--threads {num_threads}", fix="give 1 or more")
    target = Path(output)
    refuse_existing(target, overwrite)
    left_out: LeftOut = {}
    files = find_inputs(inputs, left_out=left_out)
    if notice:
        for line in filter(None, (left_out_line(left_out) if left_out else None, empty_line(files))):
            notice(line)
    if any(not file.opens and file.is_local and Path(file.address).resolve() == target.resolve() for file in files):
        raise DataError(f"--output {target} would replace the input of that name", fix="give another --output")
    library()  # missing, or nowhere to write to: said before hours of reading
    refuse_unwritable(target)
    seen, coverage, skipped = 0, Coverage(), _Skipped()

    def documents() -> Iterator[str]:
        nonlocal seen
        for file in files:
            for text in Reader(file, skipped=skipped):
                seen += 1
                if progress:
                    progress(len(text.encode()))
                yield text

    # Read before SentencePiece starts: an error in here would reach the user as one of SentencePiece's.
    kept = sample(lines(documents(), coverage), input_sentence_size, seed)
    num_lines = len(kept)
    if not kept:
        given = ", ".join(shown(str(one)) for one in inputs)
        reasons = ", ".join(f"{count:,} records skipped: {reason}" for reason, count in skipped.counts.items())
        more = f" ({reasons})" if reasons else ""
        raise DataError(f"{given}: no text in {seen} documents{more}", fix="give files with text, of lines or records")
    held = sum(_utf8_bytes(line.rstrip("\r")) for line in kept)
    coverage.sampled_out = max(0, coverage.used - held) if num_lines == input_sentence_size else 0
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
        "bytes": coverage.to_dict(),
        "skipped_records": dict(skipped.counts),
    }
