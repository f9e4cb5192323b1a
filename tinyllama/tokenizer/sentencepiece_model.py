"""A tokenizer.model and what the rest of the project asks of it. The door to the sentencepiece library."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tinyllama.errors import MissingExtraError, UserError


class Tokenizer:
    """Text to ids and back. `encode` adds neither bos nor eos; what stands between documents is the store's policy."""

    def __init__(self, path: Path, model: bytes) -> None:
        import hashlib

        try:
            import sentencepiece
        except ImportError:
            raise MissingExtraError("sentencepiece", "data") from None
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
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
                f"tokenizer {path} does not exist",
                fix="give a tokenizer.model, or train one: tinyllama tokenizer train",
            ) from None
        except PermissionError:
            raise UserError(f"tokenizer {path} is not readable", fix="grant read permission") from None
        if not model:
            raise UserError(f"tokenizer {path} is empty", fix="give a tokenizer.model")
        return cls(file, model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Ids of many texts, on `num_threads` threads; the result does not depend on their number."""
        return self._processor.encode(list(texts), num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._processor.decode(list(ids))
