"""Documents to a token store: tokenize on all cores, split off validation documents, write atomically.

One pair of shards comes from each input file, so that finished files are kept when a preparation is interrupted and
the result does not depend on the number of threads. The separator stands before every document and nowhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tinyllama.data.documents import InputFile, find_inputs, read_documents
from tinyllama.data.store import SEPARATOR_POLICY, SPLITS, Manifest, Shard, file_sha256, read_manifest
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

BATCH_DOCUMENTS = 512
Progress = Callable[[int, int], None]  # bytes of text and tokens since the last call


def is_validation(text: str, seed: int, fraction: float) -> bool:
    """Whether a document is held out: a function of its text and the seed alone, so that copies stay on one side."""
    digest = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little")
    ).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        yield batch


@dataclasses.dataclass
class _ShardWriter:
    """Writes one shard; counts what it writes."""

    tokens: IO[bytes]
    documents: IO[bytes]
    num_tokens: int = 0
    num_documents: int = 0

    def add(self, ids: Sequence[int], separator: int, dtype: str) -> None:
        import numpy as np

        np.array([self.num_tokens], dtype="<u8").tofile(self.documents)
        array = np.empty(len(ids) + 1, dtype=dtype)
        array[0], array[1:] = separator, ids
        array.tofile(self.tokens)
        self.num_tokens += len(array)
        self.num_documents += 1


def _prepare_file(
    file: InputFile, number: int, work: Path, tokenizer: Tokenizer, settings: dict[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """Tokenize one input file into `work`; returns its record, which is also left there to mark it as finished."""
    record_path = work / f"input-{number:05d}.json"
    identity = {"name": file.name, "bytes": file.path.stat().st_size, "sha256": file_sha256(file.path)}
    if record_path.exists():
        record = json.loads(record_path.read_text())
        if record["identity"] == identity:
            if progress:
                progress(sum(record["bytes_of_text"].values()), sum(s["num_tokens"] for s in record["shards"]))
            return record
    names = {split: f"{split}-{number:05d}" for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    skipped: list[dict[str, Any]] = []
    writers = {
        split: _ShardWriter(open(work / f"{name}.tokens", "wb"), open(work / f"{name}.documents", "wb"))
        for split, name in names.items()
    }
    index = 0
    for batch in _batches(read_documents(file)):
        total = 0
        for text, ids in zip(batch, tokenizer.encode_batch(batch, settings["threads"]), strict=True):
            if not ids:
                skipped.append({"input": file.name, "document": index, "reason": "empty"})
            else:
                split = "validation" if is_validation(text, settings["seed"], settings["fraction"]) else "train"
                writers[split].add(ids, tokenizer.bos_id, settings["dtype"])
                text_bytes[split] += len(text.encode())
                total += len(ids) + 1
            index += 1
        if progress:
            progress(sum(len(text.encode()) for text in batch), total)
    shards = []
    for split, writer in writers.items():
        for stream in (writer.tokens, writer.documents):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        shards.append(
            {
                "name": names[split],
                "split": split,
                "num_tokens": writer.num_tokens,
                "num_documents": writer.num_documents,
                "sha256": file_sha256(work / f"{names[split]}.tokens"),
                "documents_sha256": file_sha256(work / f"{names[split]}.documents"),
            }
        )
    record = {"identity": identity, "shards": shards, "bytes_of_text": text_bytes, "skipped": skipped}
    partial = record_path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    os.replace(partial, record_path)
    return record


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.01,
    seed: int = 1337,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenize `inputs` into the store `output`. Finished input files are kept over interruptions.

    validation_fraction: share of documents held out, chosen by their text and `seed`. Raises DataError on unreadable
    input, and where `output` exists but is something else.
    """
    target = Path(output)
    files = find_inputs(inputs)
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation fraction {validation_fraction}", fix="give a number from 0 to below 1")
    settings: dict[str, Any] = {
        "seed": seed,
        "fraction": validation_fraction,
        "threads": threads or os.cpu_count() or 1,
        "dtype": "<u2" if tokenizer.vocab_size <= 65536 else "<u4",
    }
    if target.exists() and not (target / "manifest.json").exists() and any(target.iterdir()):
        raise DataError(f"{target} exists and is not a token store", fix="give another --output")
    # What decides the bytes, but for the inputs: unfinished work under other settings must not be continued.
    key = hashlib.sha256(json.dumps([tokenizer.sha256, seed, validation_fraction]).encode()).hexdigest()[:16]
    work = target.with_name(f"{target.name}.partial-{key}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        records = [_prepare_file(f, n, work, tokenizer, settings, progress) for n, f in enumerate(files)]
    except PermissionError as error:
        raise DataError(f"cannot write {work} ({error.strerror})", fix="give a writable --output") from None
    except OSError as error:
        raise DataError(f"writing {work} failed ({error.strerror})", fix="free space and run the same again") from None
    manifest = Manifest(
        dtype=settings["dtype"],
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        separator_policy=SEPARATOR_POLICY,
        separator_id=tokenizer.bos_id,
        validation_fraction=validation_fraction,
        seed=seed,
        shards=tuple(Shard(**shard) for record in records for shard in record["shards"]),
        inputs=tuple(record["identity"] for record in records),
        skipped=tuple(entry for record in records for entry in record["skipped"]),
        bytes_of_text={split: sum(r["bytes_of_text"][split] for r in records) for split in SPLITS},
    )
    if not manifest.tokens("train"):
        shutil.rmtree(work)
        raise DataError("the inputs hold no training documents", fix="give more text or a smaller validation fraction")
    _publish(work, target, manifest)
    return manifest


def _publish(work: Path, target: Path, manifest: Manifest) -> None:
    """Make the finished folder the store: manifest last, then one rename; an older store of that name goes."""
    for record in work.glob("input-*.json"):
        record.unlink()
    (work / "manifest.partial").write_text(manifest.to_json())
    os.replace(work / "manifest.partial", work / "manifest.json")
    if target.exists():
        old = target.with_name(f"{target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if (target / "manifest.json").exists():
            read_manifest(target)  # never remove what is not a store of ours
        os.replace(target, old)
        os.replace(work, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, target)
