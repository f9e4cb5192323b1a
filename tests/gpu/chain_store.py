"""A token store of a random walk that can be learnt, written with numpy alone; and a tiny recipe on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tinyllama.data.store import LISTS, SEPARATOR_POLICY, Manifest, SplitCounts, file_sha256, shard_name, verify

VOCABULARY, SEPARATOR = 512, 1
DOCUMENT, DOCUMENTS = 301, {"train": 300, "validation": 12}  # tokens of each, separator included


def write_store(directory: Path) -> None:
    """Documents in which one of two tokens follows each: 1 bit a token at best, 9 for who knows nothing."""
    directory.mkdir(parents=True)
    draw, shards = np.random.default_rng(0), []
    for split, number in DOCUMENTS.items():
        tokens = np.empty((number, DOCUMENT), dtype="<u2")
        tokens[:, 0] = SEPARATOR
        tokens[:, 1] = draw.integers(3, VOCABULARY, number)
        for place in range(2, DOCUMENT):
            tokens[:, place] = 3 + (tokens[:, place - 1] * 5 + draw.integers(0, 2, number)) % (VOCABULARY - 3)
        name = shard_name(split, 0)
        tokens.tofile(directory / f"{name}.tokens")
        np.arange(0, number * DOCUMENT, DOCUMENT, dtype="<u8").tofile(directory / f"{name}.documents")
        sums = (file_sha256(directory / f"{name}.{kind}") for kind in ("tokens", "documents"))
        shards.append(dict(zip(("sha256", "documents_sha256"), sums, strict=True), name=name, split=split,
                           num_tokens=tokens.size, num_documents=number))  # fmt: skip
    for file in LISTS:
        lines = shards if file == "shards.jsonl" else []
        (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {split: SplitCounts(n * DOCUMENT, n, 4 * n * DOCUMENT) for split, n in DOCUMENTS.items()}
    manifest = Manifest(
        dtype="<u2",
        tokenizer_sha256="0" * 64,
        vocab_size=VOCABULARY,
        separator_policy=SEPARATOR_POLICY,
        separator_id=SEPARATOR,
        validation_fraction=0.04,
        seed=0,
        shard_tokens=2**20,
        splits=counts,
        inputs={"files": 0, "bytes": 0, "documents": 0, "skipped": 0, "excluded": {}},
        lists={file: file_sha256(directory / file) for file in LISTS},
    )
    (directory / "manifest.json").write_text(manifest.to_json())
    verify(directory)


def recipe(steps: int, save_every: int, compile: str | None) -> dict:
    """Two micro-batches of four sequences a step. The rate is high enough for something to be learnt in `steps`."""
    return {
        "model": {
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        },
        "data": {"sources": [{"name": "chain", "weight": 1.0}], "sequence_length": 128, "max_epochs": 100},
        "training": {"tokens": 1024 * steps, "batch_tokens": 1024, "micro_batch_sequences": 4, "compile": compile},
        "optimizer": {"lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 4},
        "validation": {"every_steps": steps, "max_sequences": 8},
        "checkpoint": {"every_steps": save_every, "keep_last": 10},
    }  # fmt: skip
