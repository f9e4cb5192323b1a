"""Unfinished stores: what is to be done, what is done, and how finished parts become shards.

    OUTPUT.partial/plan.json               the inputs and the settings
    OUTPUT.partial/parts/3f/3f….json       one finished input file: its counts and sha256; its tokens stand beside it
    OUTPUT.partial/layout.json             where each part lies in the streams, once all are there
    OUTPUT.partial/shards/….json           one finished shard
    OUTPUT.partial/store/                  becomes OUTPUT by a rename

Every file is written under another name and renamed, records last: whatever has a record is whole. A part's files go
once the shards that hold it are finished. Knows nothing of processes or clusters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinyllama import locks
from tinyllama.data.documents import Rules
from tinyllama.data.durable import durable, partial_name, read_json, write_json
from tinyllama.data.input_file import InputFile
from tinyllama.data.store import (
    LISTS,
    SEPARATOR_POLICY,
    SPLITS,
    VERSION,
    Manifest,
    Shard,
    SplitCounts,
    file_sha256,
    list_sha256,
    shard_name,
)
from tinyllama.errors import DataError

COPY_BYTES = 1 << 22
START_BYTES = 8  # of a document's start
RECORD = ("settings", "version", "identity", "records", "excluded", "skipped", "splits")  # what `part.py` writes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a store's bytes, but for its inputs."""

    tokenizer_sha256: str
    vocab_size: int
    separator_id: int
    validation_fraction: float
    seed: int
    rules: Rules
    shard_tokens: int

    @property
    def dtype(self) -> str:
        return "<u2" if self.vocab_size <= 65536 else "<u4"

    @property
    def key(self) -> str:
        """Parts can be kept as long as this stays: all but the shards' size."""
        return _hash([VERSION, *(v for k, v in dataclasses.asdict(self).items() if k != "shard_tokens")])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings and inputs, in the order in which they become the stream."""

    settings: Settings
    files: tuple[InputFile, ...]

    @property
    def key(self) -> str:
        """The same for the same work, whenever and wherever it is asked for."""
        return _hash(
            [VERSION, dataclasses.asdict(self.settings), [(f.name, f.size_bytes, f.version) for f in self.files]]
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One preparation of a store at a time; makes the folder. InUseError if there is another."""
    mine = locks.inside(folder)
    ours = (folder / "lock").exists() or not folder.exists() or (folder.is_dir() and set(folder.iterdir()) <= {mine})
    if not ours:
        raise DataError(f"{folder} is not an unfinished store", fix="move it away, or give another --output")
    with locks.held(mine, folder, "tinyllama data prepare"):
        (folder / "lock").touch()  # what tells an unfinished store from a folder of somebody's
        yield


class Work:
    """One unfinished store on disk."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.width = np.dtype(plan.settings.dtype).itemsize

    # -- Beginning and end ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write the plan; drop what crashed writers left, and shards that were packed from other parts."""
        for name in ("parts", "shards", "store", "progress"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob("parts/*/*.partial"), *self.folder.glob("*/*.partial")):
            stale.unlink(missing_ok=True)
        for old in self.folder.glob("progress/*.json"):
            old.unlink()
        written = dataclasses.asdict(self.plan)
        for file in written["files"]:
            del file["opens"]  # secrets stay in memory
        write_json(self.folder / "plan.json", written)
        noted = self.folder / "layout.json"
        layout = read_json(noted)
        if noted.exists() and (layout is None or self._layout() != layout):
            noted.unlink()
            for name in ("shards", "store"):
                shutil.rmtree(self.folder / name)
                (self.folder / name).mkdir()

    @classmethod
    def load(cls, folder: Path, secrets: dict[int, str] | None = None) -> Work:
        """As `begin` left it, in another process; `secrets` are those of its addresses that have any."""
        raw = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        rules = dict(raw["settings"].pop("rules"))
        rules["exclude"] = tuple((field, tuple(values)) for field, values in rules["exclude"])
        settings = Settings(rules=Rules(**rules), **raw["settings"])
        opens = secrets or {}
        files = (InputFile(**file, opens=opens.get(number, "")) for number, file in enumerate(raw["files"]))
        return cls(folder, Plan(settings, tuple(files)))

    # -- Parts ------------------------------------------------------------------------------------------------------

    def part(self, index: int) -> Path:
        """The path of one part, without a suffix. It depends on the input alone: adding others keeps it."""
        name = self.plan.files[index].key
        return self.folder / "parts" / name[:2] / name

    def part_file(self, index: int, split: str, kind: str) -> Path:
        return self.part(index).with_suffix(f".{split}.{kind}")

    def skipped_file(self, index: int) -> Path:
        return self.part(index).with_suffix(".skipped.jsonl")

    def record(self, index: int) -> dict[str, Any] | None:
        """The record of a finished part; None if it has none, or belongs to another version of the input."""
        file, record = self.plan.files[index], read_json(self.part(index).with_suffix(".json"))
        if (
            not isinstance(record, dict)
            or not {*RECORD} <= record.keys()
            or record["settings"] != self.plan.settings.key
            or record["version"] != file.version
        ):
            return None
        identity = record["identity"]
        return record if (identity["name"], identity["bytes"]) == (file.name, file.size_bytes) else None

    def is_finished(self, index: int) -> bool:
        """Whether the part is there, whole, or already lies in finished shards."""
        record = self.record(index)
        if record is None or (record["skipped"] and not self.skipped_file(index).exists()):
            return False
        for split, counts in record["splits"].items():
            sizes = self._sizes(counts["tokens"], counts["documents"])
            try:
                found = {kind: self.part_file(index, split, kind).stat().st_size for kind in sizes}
            except FileNotFoundError:
                if not self._is_packed(index, split):
                    return False
                continue
            if found != sizes:
                return False
        return True

    # -- Layout and shards ------------------------------------------------------------------------------------------

    def _layout(self) -> dict[str, Any] | None:
        """Tokens of each part in each split, and a key of all that the shards' bytes depend on; None if one is missing."""
        counts, identities = [], hashlib.sha256()
        for index in range(len(self.plan.files)):
            record = self.record(index)
            if record is None:
                return None
            counts.append([record["splits"][split]["tokens"] for split in SPLITS])
            identities.update(json.dumps([record["identity"]["sha256"], record["settings"]]).encode())
        layout = {"shard_tokens": self.plan.settings.shard_tokens, "parts": counts}
        return {**layout, "key": _hash([layout, identities.hexdigest()])}

    def lay_out(self) -> None:
        """Decide which tokens go to which shard. DataError if a part is missing or there is nothing to train on."""
        layout = self._layout()
        if layout is None:
            missing = next(file for index, file in enumerate(self.plan.files) if self.record(index) is None)
            raise DataError(f"{missing.address} is not tokenized yet", fix="run the same command again")
        if not any(counts[SPLITS.index("train")] for counts in layout["parts"]):
            raise DataError(
                "the inputs hold no training documents", fix="give more text or a smaller validation fraction"
            )
        write_json(self.folder / "layout.json", layout)

    def _load_layout(self) -> dict[str, Any]:
        if not hasattr(self, "_loaded"):
            layout = read_json(self.folder / "layout.json")
            if layout is None:
                raise DataError(f"{self.folder} has no layout", fix="run the same command again")
            parts = np.array(layout["parts"], dtype=np.int64).reshape(-1, len(SPLITS))
            ends = {split: np.cumsum(parts[:, n]) for n, split in enumerate(SPLITS)}
            self._loaded = {"key": layout["key"], "ends": ends}
        return self._loaded

    def shards(self) -> list[tuple[str, int]]:
        """Every (split, number) of the layout."""
        ends = self._load_layout()["ends"]
        return [(s, k) for s in SPLITS for k in range(-(-int(ends[s][-1]) // self.plan.settings.shard_tokens))]

    def total_bytes(self) -> int:
        """Bytes of all tokens of the layout."""
        return self.width * sum(int(ends[-1]) for ends in self._load_layout()["ends"].values())

    def packed_bytes(self) -> int:
        """About how many of them lie in finished shards: counts files, so that it can be asked often."""
        finished = len(list((self.folder / "shards").glob("*.json")))
        return min(self.total_bytes(), finished * self.plan.settings.shard_tokens * self.width)

    def _sizes(self, tokens: int, documents: int) -> dict[str, int]:
        """Bytes of the two files of a part or a shard, by their suffixes."""
        return {"tokens": tokens * self.width, "documents": documents * START_BYTES}

    def shard_record(self, split: str, number: int) -> dict[str, Any] | None:
        """The record of a finished shard of this layout; None if there is none."""
        name = shard_name(split, number)
        record = read_json(self.folder / "shards" / f"{name}.json")
        if not isinstance(record, dict) or record.get("layout") != self._load_layout()["key"]:
            return None
        sizes = self._sizes(record["num_tokens"], record["num_documents"])
        try:
            found = {kind: (self.folder / "store" / f"{name}.{kind}").stat().st_size for kind in sizes}
        except FileNotFoundError:
            return None
        return record if found == sizes else None

    def _shards_of(self, index: int, split: str) -> range:
        ends, size = self._load_layout()["ends"][split], self.plan.settings.shard_tokens
        end, begin = int(ends[index]), int(ends[index - 1]) if index else 0
        return range(begin // size, -(-end // size)) if end > begin else range(0)

    def _is_packed(self, index: int, split: str) -> bool:
        if not (self.folder / "layout.json").exists():
            return False
        return all(self.shard_record(split, number) for number in self._shards_of(index, split))

    def pack(self, split: str, number: int) -> None:
        """Write one shard from the parts that it is made of, then let go of parts that no other shard needs."""
        if self.shard_record(split, number):
            return
        layout, size = self._load_layout(), self.plan.settings.shard_tokens
        ends = layout["ends"][split]
        begin, end = number * size, min((number + 1) * size, int(ends[-1]))
        parts = range(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1)
        name = shard_name(split, number)
        target = self.folder / "store" / name
        partial = {kind: partial_name(target.with_name(f"{name}.{kind}")) for kind in ("tokens", "documents")}
        digests = {kind: hashlib.sha256() for kind in partial}
        documents = 0
        with open(partial["tokens"], "wb") as tokens_out, open(partial["documents"], "wb") as documents_out:
            for index in parts:
                origin = int(ends[index - 1]) if index else 0
                first, last = max(begin, origin), min(end, int(ends[index]))
                if last <= first:
                    continue
                source = self.part_file(index, split, "tokens")
                _copy(source, (first - origin) * self.width, (last - first) * self.width, tokens_out, digests["tokens"])
                starts = np.fromfile(self.part_file(index, split, "documents"), dtype="<u8").astype(np.int64) + origin
                starts = starts[(starts >= first) & (starts < last)] - begin
                data = starts.astype("<u8").tobytes()
                documents_out.write(data)
                digests["documents"].update(data)
                documents += len(starts)
            for stream in (tokens_out, documents_out):
                stream.flush()
                os.fsync(stream.fileno())
        for kind, path in partial.items():
            os.replace(path, target.with_name(f"{name}.{kind}"))
        hashes = (digests["tokens"].hexdigest(), digests["documents"].hexdigest())
        shard = Shard(name, split, end - begin, documents, *hashes)
        record = {"layout": layout["key"], **dataclasses.asdict(shard)}
        write_json(self.folder / "shards" / f"{name}.json", record)
        for index in parts:
            if self._is_packed(index, split):
                for kind in ("tokens", "documents"):
                    self.part_file(index, split, kind).unlink(missing_ok=True)

    # -- The finished store -----------------------------------------------------------------------------------------

    def publish(self, target: Path) -> Manifest:
        """Write the lists and the manifest, then let the folder appear under its name. An older store of it goes."""
        store, settings = self.folder / "store", self.plan.settings
        with durable(store / "shards.jsonl") as stream:
            for split, number in self.shards():
                record = self.shard_record(split, number)
                if record is None:
                    raise DataError(f"shard {shard_name(split, number)} is not packed yet", fix="run the same again")
                del record["layout"]
                stream.write(json.dumps(record) + "\n")
        splits, provenance = self._write_lists(store)
        manifest = Manifest(
            dtype=settings.dtype,
            tokenizer_sha256=settings.tokenizer_sha256,
            vocab_size=settings.vocab_size,
            separator_policy=SEPARATOR_POLICY,
            separator_id=settings.separator_id,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
            shard_tokens=settings.shard_tokens,
            splits=splits,
            inputs={**provenance, "rules": dataclasses.asdict(settings.rules)},
            lists={name: list_sha256(store / name) for name in LISTS},
        )
        write_json(
            store / "prepared.json", {"plan": self.plan.key, "inputs_sha256": file_sha256(store / "inputs.jsonl")}
        )
        with durable(store / "manifest.json") as stream:
            stream.write(manifest.to_json())
        self._keep_tokenizer(target)
        old = self.folder / f"replaced-{os.getpid()}"  # below our own folder: no name that could be somebody's
        if target.exists():
            os.replace(target, old)
        os.replace(store, target)
        shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    def _keep_tokenizer(self, target: Path) -> None:
        """Training and export look for the tokenizer beside the stores that it made."""
        beside = target.with_name("tokenizer.model")
        if not beside.exists():
            with durable(beside, "wb") as stream:
                stream.write((self.folder / "tokenizer.model").read_bytes())

    def _write_lists(self, store: Path) -> tuple[dict[str, SplitCounts], dict[str, Any]]:
        """Write inputs.jsonl and skipped.jsonl; returns the counts of each split and of all inputs."""
        totals = {split: dict.fromkeys(("tokens", "documents", "bytes_of_text"), 0) for split in SPLITS}
        excluded: Counter[str] = Counter()
        sums = dict.fromkeys(("bytes", "records", "skipped"), 0)
        with durable(store / "inputs.jsonl") as inputs, durable(store / "skipped.jsonl") as skipped:
            for index in range(len(self.plan.files)):
                record = self.record(index)
                assert record is not None, "laid out, so recorded"
                for split, counts in record["splits"].items():
                    for key, value in counts.items():
                        totals[split][key] += value
                excluded.update(record["excluded"])
                kept = {key: record[key] for key in ("records", "skipped", "excluded", "splits")}
                for key in sums:
                    sums[key] += record["identity"]["bytes"] if key == "bytes" else record[key]
                address = self.plan.files[index].address
                inputs.write(json.dumps({**record["identity"], "address": address, **kept}, ensure_ascii=False) + "\n")
                if record["skipped"]:
                    with open(self.skipped_file(index), encoding="utf-8") as stream:
                        for number, reason in map(json.loads, stream):
                            entry = {"input": record["identity"]["name"], "record": number, "reason": reason}
                            skipped.write(json.dumps(entry, ensure_ascii=False) + "\n")
        counted = {"files": len(self.plan.files), **sums, "excluded": dict(sorted(excluded.items()))}
        return {split: SplitCounts(**counts) for split, counts in totals.items()}, counted


def _copy(source: Path, offset: int, count: int, out: IO[bytes], digest: Any) -> None:
    """`count` bytes of a part from `offset` on, hashed on the way."""
    with open(source, "rb") as stream:
        stream.seek(offset)
        while count:
            data = stream.read(min(COPY_BYTES, count))
            if not data:
                raise DataError(f"{source} is shorter than its record says", fix="run the same command again")
            out.write(data)
            digest.update(data)
            count -= len(data)
