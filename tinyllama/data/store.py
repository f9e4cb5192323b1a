"""The token store: flat little-endian token shards, document boundaries, and a manifest that can be checked.

    STORE/manifest.json               what is here, where it came from, and a sha256 for every file
    STORE/train-00000.tokens          uint16 (uint32 above 65,536 pieces): every document, one separator before each
    STORE/train-00000.documents       uint64: where each document's separator stands in the shard
    STORE/validation-00000.tokens     the held-out documents, in the same form

A store without a manifest is not a store: the manifest is written last, by an atomic rename. No padding, no dropped
tails. `docs/data.md` describes the format for other readers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import DataError

if TYPE_CHECKING:
    import numpy as np

FORMAT, VERSION = "tinyllama-token-store", 1
SEPARATOR_POLICY = "bos-before-each-document"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One pair of files in a store. sha256 is of the tokens file, documents_sha256 of the boundaries."""

    name: str
    split: str
    num_tokens: int
    num_documents: int
    sha256: str
    documents_sha256: str

    @property
    def tokens_file(self) -> str:
        return f"{self.name}.tokens"

    @property
    def documents_file(self) -> str:
        return f"{self.name}.documents"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds. `inputs` is the provenance of each input file; `skipped` the documents left out, and why."""

    dtype: str
    tokenizer_sha256: str
    vocab_size: int
    separator_policy: str
    separator_id: int
    validation_fraction: float
    seed: int
    shards: tuple[Shard, ...]
    inputs: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, Any], ...]
    bytes_of_text: dict[str, int]

    def tokens(self, split: str) -> int:
        """Number of tokens in one split, separators included."""
        return sum(s.num_tokens for s in self.shards if s.split == split)

    def documents(self, split: str) -> int:
        """Number of documents in one split."""
        return sum(s.num_documents for s in self.shards if s.split == split)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """The identity of the store's content: any change of a token or a boundary changes it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a store; DataError if there is none or it is of another format."""
    path = Path(directory) / "manifest.json"
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{directory} is not a token store", fix="make one: tinyllama data prepare") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error})", fix="prepare the store again") from None
    if raw.pop("format", None) != FORMAT or raw.pop("version", None) != VERSION:
        raise DataError(f"{path} is not of format {FORMAT} version {VERSION}", fix="prepare the store again")
    shards = tuple(Shard(**s) for s in raw.pop("shards"))
    return Manifest(shards=shards, inputs=tuple(raw.pop("inputs")), skipped=tuple(raw.pop("skipped")), **raw)


class TokenStore:
    """One split of a store, as one long token stream over memory-mapped shards. Opening reads no token."""

    def __init__(self, directory: str | os.PathLike[str], split: str = "train") -> None:
        import numpy as np

        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.split = split
        self.shards = [s for s in self.manifest.shards if s.split == split and s.num_tokens]
        self.starts = np.cumsum([0] + [s.num_tokens for s in self.shards])
        self.num_tokens = int(self.starts[-1])
        self._maps: dict[int, np.memmap] = {}
        width = np.dtype(self.manifest.dtype).itemsize
        for shard in self.shards:
            path = self.directory / shard.tokens_file
            size = path.stat().st_size if path.exists() else -1
            if size != shard.num_tokens * width:
                raise DataError(
                    f"{path} has {max(size, 0):,} bytes, the manifest says {shard.num_tokens * width:,}",
                    fix="prepare the store again",
                )

    def _map(self, index: int) -> np.memmap:
        import numpy as np

        if index not in self._maps:
            shard = self.shards[index]
            self._maps[index] = np.memmap(
                self.directory / shard.tokens_file, dtype=self.manifest.dtype, mode="r", shape=(shard.num_tokens,)
            )
        return self._maps[index]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the split's stream, across shard borders. Shape (count,)."""
        import numpy as np

        if start < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens}")
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        while count:
            offset = start - int(self.starts[index])
            piece = self._map(index)[offset : offset + count]
            pieces.append(piece)
            start, count, index = start + len(piece), count - len(piece), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def boundaries(self, index: int) -> np.ndarray:
        """Where the documents of shard `index` start, in tokens from the shard's beginning. Shape (documents,)."""
        import numpy as np

        return np.fromfile(self.directory / self.shards[index].documents_file, dtype="<u8")

    def document(self, index: int, number: int) -> np.ndarray:
        """Tokens of document `number` of shard `index`, its separator first."""
        starts = self.boundaries(index)
        end = int(starts[number + 1]) if number + 1 < len(starts) else self.shards[index].num_tokens
        return self._map(index)[int(starts[number]) : end]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(directory: str | os.PathLike[str]) -> Manifest:
    """Read every byte of a store and compare it with the manifest; DataError names the first bad file."""
    import numpy as np

    manifest = read_manifest(directory)
    root = Path(directory)
    for shard in manifest.shards:
        expected = ((shard.tokens_file, shard.sha256), (shard.documents_file, shard.documents_sha256))
        for name, digest in expected:
            if not (root / name).exists():
                raise DataError(f"{root / name} is missing", fix="prepare the store again")
            if file_sha256(root / name) != digest:
                raise DataError(f"{root / name} does not match its checksum", fix="prepare the store again")
        tokens = np.fromfile(root / shard.tokens_file, dtype=manifest.dtype)
        starts = np.fromfile(root / shard.documents_file, dtype="<u8")
        separators = np.flatnonzero(tokens == manifest.separator_id)
        if len(tokens) != shard.num_tokens or len(starts) != shard.num_documents:
            raise DataError(f"{root / shard.tokens_file} has other counts than its manifest", fix="prepare again")
        if not np.array_equal(separators, starts):
            raise DataError(f"{root / shard.tokens_file}: separators and boundaries differ", fix="prepare again")
        if len(tokens) and int(tokens.max()) >= manifest.vocab_size:
            raise DataError(f"{root / shard.tokens_file} holds token {int(tokens.max())}", fix="prepare again")
    return manifest
