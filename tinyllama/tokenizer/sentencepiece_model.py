"""A tokenizer.model and what the rest of the project asks of it. The door to the sentencepiece library.

Knows nothing of documents, stores or Hugging Face. `Tokenizer.load("tokenizer.model").encode("text")` gives ids.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama.errors import DataError, MissingExtraError, UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece's piece types
SPACE = "▁"


def library() -> Any:
    """The module sentencepiece; MissingExtraError names the extra that brings it."""
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtraError("sentencepiece", "data") from None
    return sentencepiece


def parse(model: bytes) -> Any:
    """The pieces and the settings in a tokenizer.model: sentencepiece's ModelProto."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    return proto


class Tokenizer:
    """Text to ids and back. `encode` adds neither bos nor eos; what stands between documents is the store's policy."""

    def __init__(self, path: Path, model: bytes) -> None:
        import hashlib

        self.path = path
        self._model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor = library().SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model ({error})", fix="give a tokenizer.model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path} has no bos or eos piece", fix="train one: tinyllama tokenizer train")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a .model file, or a folder that holds tokenizer.model. UserError if missing or broken."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.model"
        try:
            model = file.read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"tokenizer {file} does not exist",
                fix="give a tokenizer.model, or train one: tinyllama tokenizer train",
            ) from None
        except OSError as error:
            raise UserError(
                f"tokenizer {file} cannot be read ({error.strerror})", fix="give a readable tokenizer.model"
            ) from None
        if not model:
            raise UserError(f"tokenizer {file} is empty", fix="give a tokenizer.model")
        return cls(file, model)

    def pieces(self) -> list[tuple[str, int]]:
        """Every piece and its type, by id."""
        return [(piece.piece, piece.type) for piece in parse(self._model).pieces]

    @property
    def is_llama_like(self) -> bool:
        """Whether this is BPE that takes text as it is: no normalization, a space before it, spaces kept as they are."""
        proto = parse(self._model)
        spec, rules = proto.trainer_spec, proto.normalizer_spec
        plain = rules.name == "identity" and not rules.precompiled_charsmap and not rules.remove_extra_whitespaces
        spaces = rules.add_dummy_prefix and rules.escape_whitespaces and not spec.treat_whitespace_as_suffix
        return spec.model_type == 2 and spec.byte_fallback and plain and spaces

    @property
    def kind(self) -> str:
        """The settings in which tokenizers differ, for a person: "BPE, normalized by nmt_nfkc, without bytes"."""
        proto = parse(self._model)
        spec, rules = proto.trainer_spec, proto.normalizer_spec
        parts = {1: "unigram", 2: "BPE"}.get(spec.model_type, "a model of another kind")
        parts += f", normalized by {rules.name or 'a map of its own'}" if rules.precompiled_charsmap else ""
        parts += ", with extra spaces removed" if rules.remove_extra_whitespaces else ""
        parts += "" if rules.add_dummy_prefix else ", without a space before a text"
        return parts + ("" if spec.byte_fallback else ", without bytes")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos. DataError if the text holds a lone surrogate."""
        try:
            return self._processor.encode(text)
        except (RuntimeError, TypeError):
            _refuse_lone_surrogate(text)
            raise

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Ids of many texts, on `num_threads` threads; the result does not depend on their number."""
        texts = list(texts)
        try:
            return self._processor.encode(texts, num_threads=num_threads)
        except (RuntimeError, TypeError):
            for text in texts:
                _refuse_lone_surrogate(text)
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. IndexError for an id that is not in the vocabulary."""
        return self._processor.decode(list(ids))


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair without the other, and where; None if there is none.

    JSON's escapes can say it, UTF-8 cannot. It is never replaced silently: what is trained on would differ from what the
    file holds.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
    return None


def _refuse_lone_surrogate(text: str) -> None:
    if found := lone_surrogate(text):
        raise DataError(f"text has {found}", fix="replace it (in Python: text.encode('utf-8', 'replace').decode())")
