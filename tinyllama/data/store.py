"""The token store: one stream of tokens a split, cut into shards of equal size, and a manifest that can be checked.

    STORE/manifest.json               what is here: a page, whatever the size; the checksums of the three lists below
    STORE/shards.jsonl                each shard's counts and sha256
    STORE/inputs.jsonl                the provenance of each input file
    STORE/skipped.jsonl               each document that was left out, and why
    STORE/train-000000.tokens         little-endian uint16 (uint32 above 65,536 pieces), nothing but tokens
    STORE/train-000000.documents      little-endian uint64: where documents start in this shard
    STORE/validation-000000.tokens    the held-out documents, in the same form

Every shard of a split has `shard_tokens` tokens, but for the last one. So a position is found by a division, and opening
and seeking cost the same for any size. A document may go on in the next shard. No padding, no dropped tails. A store
without a manifest is not a store: the manifest is written last, by an atomic rename. `docs/data.md` has the format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.data.durable import read_json
from tinyllama.errors import DataError

FORMAT, VERSION = "tinyllama-token-store", 2
SEPARATOR_POLICY = "bos-before-each-document"
SPLITS = ("train", "validation")
LISTS = ("shards.jsonl", "inputs.jsonl", "skipped.jsonl")
CHUNK_TOKENS = 1 << 22  # read at a time where whole shards are read
OPEN_SHARDS = 256  # files kept open at once
AGAIN = "prepare the store again with --overwrite, or fetch it whole"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One pair of files. sha256 is of the tokens file, documents_sha256 of the starts; num_documents start here."""

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


def shard_name(split: str, number: int) -> str:
    """The name of one shard, without a suffix."""
    return f"{split}-{number:06d}"


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """One split: tokens with separators, documents, and bytes of their text in UTF-8."""

    tokens: int
    documents: int
    bytes_of_text: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds. inputs: files, bytes, documents, skipped, and excluded by reason. lists: sha256 by file."""

    dtype: str
    tokenizer_sha256: str
    vocab_size: int
    separator_policy: str
    separator_id: int
    validation_fraction: float
    seed: int
    shard_tokens: int
    splits: dict[str, SplitCounts]
    inputs: dict[str, Any]
    lists: dict[str, str]

    def tokens(self, split: str) -> int:
        """Number of tokens in one split, separators included."""
        return self.splits[split].tokens

    def documents(self, split: str) -> int:
        """Number of documents in one split."""
        return self.splits[split].documents

    def num_shards(self, split: str) -> int:
        return -(-self.tokens(split) // self.shard_tokens)

    def to_json(self) -> str:
        values = {"format": FORMAT, "version": VERSION, "sha256": self.sha256, **dataclasses.asdict(self)}
        return json.dumps(values, indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """The identity of the store: any change of a token, a boundary or a count changes it."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a store; DataError if there is none or it is of another format."""
    path = Path(directory) / "manifest.json"
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{directory} is not a token store", fix="make one: tinyllama data prepare") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", fix="grant read permission") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})", fix=AGAIN) from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT or raw.pop("version", None) != VERSION:
        raise DataError(f"{path} is not of format {FORMAT} version {VERSION}", fix=AGAIN)
    try:
        expected, counts = raw.pop("sha256"), raw.pop("splits")
        manifest = Manifest(splits={name: SplitCounts(**counts[name]) for name in SPLITS}, **raw)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks a field ({error})", fix=AGAIN) from None
    if manifest.sha256 != expected:
        raise DataError(f"{path} does not match its own checksum", fix=AGAIN)
    return manifest


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[Path]:
    """Errors of the operating system about one file of a store, as one line."""
    try:
        yield path
    except FileNotFoundError:
        raise DataError(f"{path} is missing", fix=AGAIN) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", fix="grant read permission") from None


def read_list(directory: str | os.PathLike[str], name: str) -> Iterator[dict[str, Any]]:
    """The entries of one of LISTS; DataError if the file is missing or broken."""
    path = Path(directory) / name
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", fix=AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is corrupt ({error})", fix=AGAIN) from None


class TokenStore:
    """One split of a store, as one long stream over its shards. Opening reads the manifest and no token.

    Windows are read with one `pread` each. A mapped file would read ahead (megabytes, for the few kilobytes that a
    random window needs), and would answer an I/O error by killing the process. `shard` maps a whole one for scans.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str = "train") -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.split = split
        self.num_tokens = self.manifest.tokens(split)
        self.num_documents = self.manifest.documents(split)
        self.shard_tokens = self.manifest.shard_tokens
        self.dtype = np.dtype(self.manifest.dtype)
        self._width = self.dtype.itemsize
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the least recently used first

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def _shard_length(self, index: int) -> int:
        return min(self.shard_tokens, self.num_tokens - index * self.shard_tokens)

    def _path(self, index: int, kind: str) -> Path:
        return self.directory / f"{shard_name(self.split, index)}.{kind}"

    def check_sizes(self) -> None:
        """DataError names the first shard that is missing or has another size than the manifest says. Reads none."""
        for index in range(self.manifest.num_shards(self.split)):
            with _explained(self._path(index, "tokens")) as path:
                self._check_size(index, path.stat().st_size)

    def _check_size(self, index: int, size: int) -> None:
        expected = self._shard_length(index) * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"{self._path(index, 'tokens')} has {size:,} bytes, the manifest says {expected:,}", fix=AGAIN
            )

    def check_sums(self, count: int) -> None:
        """DataError names the first of the split's first `count` shards whose tokens do not match their checksum."""
        if not count:
            return
        with _explained(self.directory / "shards.jsonl") as path:
            if file_sha256(path) != self.manifest.lists.get(path.name):
                raise DataError(f"{path} does not match its checksum", fix=AGAIN)
        sums = [entry["sha256"] for entry in read_list(self.directory, "shards.jsonl") if entry["split"] == self.split]
        for index, expected in enumerate(sums[:count]):
            with _explained(self._path(index, "tokens")) as path:
                if file_sha256(path) != expected:
                    raise DataError(f"{path} does not match its checksum", fix=AGAIN)

    def refuse_token(self, start: int, tokens: np.ndarray) -> None:
        """DataError for the first of `tokens`, read from position `start` on, that is beyond the vocabulary."""
        position = start + int(np.argmax(tokens >= self.manifest.vocab_size))
        index, offset = divmod(position, self.shard_tokens)
        raise DataError(
            f"{self._path(index, 'tokens')} holds token {int(tokens[position - start])} at position {offset:,}, of a "
            f"vocabulary of {self.manifest.vocab_size:,}",
            fix=AGAIN,
        )

    def _file(self, index: int) -> int:
        """The open file of one shard. At most OPEN_SHARDS are kept: 1,024 descriptors are a common limit."""
        found = self._files.get(index)
        if found is None:
            with _explained(self._path(index, "tokens")) as path:
                found = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            try:
                self._check_size(index, os.fstat(found).st_size)
            except BaseException:
                os.close(found)
                raise
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[index] = found
        else:
            self._files.move_to_end(index)
        return found

    def shard(self, index: int) -> np.ndarray:
        """The tokens of one shard, memory-mapped: shape (tokens,)."""
        with _explained(self._path(index, "tokens")) as path:
            self._check_size(index, path.stat().st_size)
            return np.memmap(path, dtype=self.dtype, mode="r", shape=(self._shard_length(index),))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the split's stream, across shard borders. Shape (count,)."""
        out = np.empty(count, dtype=self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (of the store's dtype, one axis) with the tokens from `start` on."""
        if start < 0 or start + len(out) > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + len(out)}) of {self.num_tokens}")
        rest: Any = out
        while len(rest):
            index, offset = divmod(start, self.shard_tokens)
            here = rest if len(rest) <= self.shard_tokens - offset else rest[: self.shard_tokens - offset]
            try:
                count = os.preadv(self._file(index), (here,), offset * self._width) // self._width
            except OSError as error:
                raise DataError(f"{self._path(index, 'tokens')} cannot be read ({error.strerror})", fix=AGAIN) from None
            if count <= 0:
                raise DataError(f"{self._path(index, 'tokens')} breaks off", fix=AGAIN)
            rest, start = rest[count:], start + count

    def starts(self, index: int) -> np.ndarray:
        """Where documents start in shard `index`, in tokens from its beginning, ascending. Shape (documents,)."""
        with _explained(self._path(index, "documents")) as path:
            if path.stat().st_size % 8:
                raise DataError(f"{path} breaks off", fix=AGAIN)
            starts = np.fromfile(path, dtype="<u8")
        if len(starts) and (int(starts[-1]) >= self._shard_length(index) or (starts[1:] <= starts[:-1]).any()):
            raise DataError(f"{path} makes no sense: documents start out of order or beyond its end", fix=AGAIN)
        return starts

    def documents(self) -> Iterator[np.ndarray]:
        """Every document in order, its separator first."""
        begin = None
        for index in range(self.manifest.num_shards(self.split)):
            for start in self.starts(index).tolist():
                position = index * self.shard_tokens + start
                if begin is not None:
                    yield self.read(begin, position - begin)
                begin = position
        if begin is not None:
            yield self.read(begin, self.num_tokens - begin)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_sha256(path: Path) -> str:
    """sha256 of one of LISTS, without the addresses in it: a store is the same wherever its inputs lay."""
    if path.name != "inputs.jsonl":
        return file_sha256(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
                entry.pop("address", None)
                line = f"{json.dumps(entry, ensure_ascii=False)}\n".encode()
            except (ValueError, AttributeError, TypeError, RecursionError):
                pass  # no entry: it counts as it is, and will not match
            digest.update(line)
    return digest.hexdigest()


def verify_shard(directory: Path, manifest: Manifest, shard: Shard, index: int) -> str | None:
    """What is wrong with one shard, naming the file; None if it is intact. Reads every byte, in bounded memory."""
    width = np.dtype(manifest.dtype).itemsize
    expected = min(manifest.shard_tokens, manifest.tokens(shard.split) - index * manifest.shard_tokens)
    if shard.name != shard_name(shard.split, index) or shard.num_tokens != expected:
        return f"{directory / 'shards.jsonl'} does not fit manifest.json at {shard.name}"
    tokens, documents = directory / shard.tokens_file, directory / shard.documents_file
    try:
        if file_sha256(documents) != shard.documents_sha256:
            return f"{documents} does not match its checksum"
        starts = np.fromfile(documents, dtype="<u8")
        if len(starts) != shard.num_documents:
            return f"{documents} has {len(starts):,} documents, shards.jsonl says {shard.num_documents:,}"
        digest, position, seen = hashlib.sha256(), 0, 0
        with open(tokens, "rb") as stream:
            while chunk := stream.read(CHUNK_TOKENS * width):
                digest.update(chunk)
                if len(chunk) % width:
                    return f"{tokens} ends inside a token"
                ids = np.frombuffer(chunk, dtype=manifest.dtype)
                if int(ids.max()) >= manifest.vocab_size:
                    return f"{tokens} holds token {int(ids.max())} of {manifest.vocab_size}"
                found = np.flatnonzero(ids == manifest.separator_id) + position
                if not np.array_equal(found, starts[seen : seen + len(found)]):
                    return f"{tokens}: separators and document starts differ"
                position, seen = position + len(ids), seen + len(found)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or tokens} cannot be read ({error.strerror})"
    if digest.hexdigest() != shard.sha256:
        return f"{tokens} does not match its checksum"
    if position != shard.num_tokens or seen != len(starts):
        return f"{tokens} has other counts than shards.jsonl says"
    if index == 0 and not (len(starts) and starts[0] == 0):
        return f"{tokens} does not begin with a document"
    return None


def verify(
    directory: str | os.PathLike[str], *, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> Manifest:
    """Read every byte of a store and compare it with the manifest; DataError names the first bad file.

    progress: called with the bytes of each shard read. Shards are read in parallel; hashing releases the lock.
    """
    from concurrent.futures import ThreadPoolExecutor

    manifest = read_manifest(directory)
    root = Path(directory)
    for name in LISTS:
        with _explained(root / name) as path:
            asked = read_json(root / "prepared.json")
            noted = asked.get("inputs_sha256") if isinstance(asked, dict) and name == "inputs.jsonl" else None
            if list_sha256(path) != manifest.lists.get(name) or (noted and noted != file_sha256(path)):
                raise DataError(f"{path} does not match its checksum", fix=AGAIN)
    try:
        shards = [Shard(**entry) for entry in read_list(root, "shards.jsonl")]
    except TypeError as error:
        raise DataError(f"{root / 'shards.jsonl'} is no list of shards ({error})", fix=AGAIN) from None
    numbered = []
    for split in SPLITS:
        mine = [shard for shard in shards if shard.split == split]
        if len(mine) != manifest.num_shards(split) or sum(s.num_documents for s in mine) != manifest.documents(split):
            raise DataError(f"{root / 'shards.jsonl'} does not fit manifest.json", fix=AGAIN)
        numbered += list(enumerate(mine))
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        results = pool.map(lambda item: verify_shard(root, manifest, item[1], item[0]), numbered)
        for (_, shard), wrong in zip(numbered, results, strict=True):
            if wrong:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(wrong, fix=AGAIN)
            if progress:
                progress(shard.num_tokens * np.dtype(manifest.dtype).itemsize)
    return manifest
