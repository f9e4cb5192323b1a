"""How fast training tokens are searched for the 13-grams of a bundle, and in how much memory.

    python benchmarks/data_contamination.py --tokenizer tokenizer.model --against evalsuite/bundles/mini

Random tokens stand for the store: the search takes the same for any, but for the few matches. One process, one thread and
then all cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from data_loading import write_manifest
from record import record, show

from tinyllama.data.contamination import NGRAM, NgramIndex, read_items, scan
from tinyllama.data.store import TokenStore, shard_name
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--against", type=Path, required=True, help="a bundle's folder")
    parser.add_argument("--million-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tinyllama-benchmark-"))
    try:
        tokens = arguments.million_tokens * 1_000_000
        write_manifest(folder / "store", tokens)
        with open(folder / "store" / f"{shard_name('train', 0)}.tokens", "wb") as stream:
            generator = np.random.default_rng(0)
            for _ in range(arguments.million_tokens):
                generator.integers(3, 32000, 1_000_000, dtype=np.uint16).tofile(stream)
        items, ids, _ = read_items(arguments.against, Tokenizer.load(arguments.tokenizer), "<u2")
        index = NgramIndex(items, ids, NGRAM)
        indexed = peak_mib()
        rows = []
        for threads in sorted({1, os.cpu_count() or 1}):
            store = TokenStore(folder / "store")
            started = time.perf_counter()
            scan(store, index, threads)
            speed = tokens / (time.perf_counter() - started) / 1e6
            rows.append({"threads": threads, "million_tokens_per_s": round(speed, 1), "peak_mib": round(peak_mib(), 1)})
    finally:
        shutil.rmtree(folder)
    show(
        f"{len(index.hashes):,} distinct {NGRAM}-grams of {len(items):,} items ({len(ids):,} tokens), "
        f"searched for in {tokens:,} tokens",
        ("threads", "M tokens/s", "peak, MiB"),
        [(str(r["threads"]), f"{r['million_tokens_per_s']:.1f}", f"{r['peak_mib']:.0f}") for r in rows],
    )
    values = {
        "items": len(items),
        "item_tokens": len(ids),
        "distinct_ngrams": len(index.hashes),
        "training_tokens": tokens,
        "peak_mib_with_index": round(indexed, 1),
        "rows": rows,
    }
    print(record("data_contamination", ("numpy",), values, arguments.output))


if __name__ == "__main__":
    main()
