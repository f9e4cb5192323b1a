"""How many bytes of text the held-out windows have that were scored: what bits per byte are counted over.

The manifest knows the bytes of a whole split. For its first windows the tokenizer says what each token stands for. That is
exact where it keeps text as it is (no normalization, bytes for what it has no piece for), as Llama's and those that
`tinyllama tokenizer train` makes do; else it is scaled by what the whole split has. A U+2581 in a text has one byte here, of
its three: SentencePiece makes it a space, and no token says which it was.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyllama.data.loader import HeldOut
from tinyllama.errors import MissingExtraError
from tinyllama.tokenizer.sentencepiece_model import BYTE, CONTROL, SPACE, UNKNOWN, parse

CHUNK_TOKENS = 1 << 22  # read at a time
UNUSED = 5  # SentencePiece's type of a piece that is never made


class TextBytes:
    """Bytes of UTF-8 of the first windows of a held-out split. tokenizer: its tokenizer.model; None where there is none."""

    def __init__(self, tokenizer: Path | None) -> None:
        self._lengths: np.ndarray | None = None  # bytes of each piece, (vocabulary,)
        self._exact, self._prefix = False, False
        self._known: dict[tuple[str, int], float | None] = {}
        if tokenizer is None:
            return
        try:
            proto = parse(tokenizer.read_bytes())
        except (ImportError, MissingExtraError):
            return
        silent = (UNKNOWN, CONTROL, UNUSED)
        self._lengths = np.array(
            [
                1 if p.type == BYTE else 0 if p.type in silent else len(p.piece.replace(SPACE, " ").encode())
                for p in proto.pieces
            ],
            dtype=np.int64,
        )
        spec, rules = proto.trainer_spec, proto.normalizer_spec
        self._prefix = rules.add_dummy_prefix and not spec.treat_whitespace_as_suffix
        plain = rules.name == "identity" and not rules.precompiled_charsmap and not rules.remove_extra_whitespaces
        self._exact = plain and spec.byte_fallback and rules.escape_whitespaces and not spec.treat_whitespace_as_suffix

    def of(self, source: HeldOut, max_windows: int) -> float | None:
        """Bytes of the targets of a source's first `max_windows` windows; None where nothing says it."""
        key = (source.name, max_windows)
        if key not in self._known:
            self._known[key] = self._count(source, max_windows)
        return self._known[key]

    def _count(self, source: HeldOut, max_windows: int) -> float | None:
        if max_windows >= source.num_windows:
            return float(source.bytes_of_text)  # every token but the first, which is no text, is a target
        if self._lengths is None:
            return None
        scored = self._sum(source, max_windows * source.sequence_length + 1)
        if self._exact:
            return float(scored)
        whole = self._sum(source, source.store.num_tokens)
        return scored * source.bytes_of_text / whole if whole else None

    def _sum(self, source: HeldOut, num_tokens: int) -> int:
        """Bytes of the split's first tokens. The space that a document gets before its first token is none of its text."""
        assert self._lengths is not None
        separator, total, before = source.store.manifest.separator_id, 0, -1
        for start in range(0, num_tokens, CHUNK_TOKENS):
            tokens = source.store.read(start, min(CHUNK_TOKENS, num_tokens - start)).astype(np.int64)
            total += int(self._lengths[tokens].sum())
            if self._prefix:
                first = np.concatenate(([before], tokens[:-1])) == separator
                total -= int((first & (tokens != separator)).sum())
            before = int(tokens[-1])
        return total
