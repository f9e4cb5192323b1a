"""How fast batches are read, and what opening and seeking cost from ten million to ten trillion tokens.

    python benchmarks/data_loading.py

The large stores are sparse files: they have the real number of shards and the real sizes, and no disk. Each size is
opened in a new process, with a seek to sample 10^9. The throughput is that of `Mixture.fetch` on a store of random
tokens that the system holds in memory, so that the loader is measured and not the disk; a plain loop over a shuffled
array of windows stands beside it, with what that array costs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import record, show

from tinyllama.data.defaults import SHARD_TOKENS
from tinyllama.data.loader import Mixture, Source
from tinyllama.data.store import (
    LISTS,
    SEPARATOR_POLICY,
    Manifest,
    SplitCounts,
    shard_name,
)

SEQUENCE = 2048


def write_manifest(folder: Path, tokens: int, shard_tokens: int = SHARD_TOKENS) -> Manifest:
    folder.mkdir(parents=True)
    manifest = Manifest(
        dtype="<u2",
        tokenizer_sha256="0" * 64,
        vocab_size=32000,
        separator_policy=SEPARATOR_POLICY,
        separator_id=1,
        validation_fraction=0.0,
        seed=0,
        shard_tokens=shard_tokens,
        splits={"train": SplitCounts(tokens, 1, 1), "validation": SplitCounts(0, 0, 0)},
        inputs={},
        lists=dict.fromkeys(LISTS, ""),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def virtual_store(folder: Path, tokens: int, shard_tokens: int = SHARD_TOKENS) -> int:
    """A store of sparse shards: as many tokens as one likes, and no disk. Returns the number of shards."""
    manifest = write_manifest(folder, tokens, shard_tokens)
    for index in range(manifest.num_shards("train")):
        with open(folder / f"{shard_name('train', index)}.tokens", "wb") as stream:
            stream.truncate(2 * min(shard_tokens, tokens - index * shard_tokens))
    return manifest.num_shards("train")


OPEN = """
import json, sys, time
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
begin = time.perf_counter()
from pathlib import Path
from tinyllama.data.loader import Mixture, Source
imported = time.perf_counter()
before = peak()
mixture = Mixture([Source("a", Path(sys.argv[1]), 1.0)], 2048, 1)
opened = time.perf_counter()
mixture.fetch(range(10**9, 10**9 + 8))
done = time.perf_counter()
print(json.dumps({"import_s": imported - begin, "open_s": opened - imported, "seek_and_batch_s": done - opened,
                  "total_s": done - begin, "peak_mib": peak(), "peak_mib_after_imports": before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million-tokens", type=int, default=200, help="size of the store that is really read")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each batch size")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    opening, loading = [], []
    with tempfile.TemporaryDirectory(prefix="tinyllama-benchmark-") as scratch:
        root = Path(scratch)
        for exponent in (7, 9, 11, 13):
            shards = virtual_store(root / f"virtual{exponent}", 10**exponent)
            runs = []
            for _ in range(5):
                command = [sys.executable, "-c", OPEN, str(root / f"virtual{exponent}")]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout))
            best = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
            opening.append({"tokens": 10**exponent, "shards": shards, **best})

        tokens = arguments.million_tokens * 1_000_000
        write_manifest(root / "dense", tokens)
        generator = np.random.default_rng(0)
        generator.integers(0, 32000, tokens, dtype=np.uint16).tofile(
            root / "dense" / f"{shard_name('train', 0)}.tokens"
        )
        mixture = Mixture([Source("a", root / "dense", 1.0)], SEQUENCE, 1)
        windows = mixture.order.windows[0]
        mixture.fetch(range(windows))  # the whole store passes once, so that it is in the system's cache
        stream = np.memmap(root / "dense" / f"{shard_name('train', 0)}.tokens", dtype="<u2", mode="r")
        shuffled = generator.permutation(windows)

        def ours(first: int, batch: int) -> int:
            ids, _targets = mixture.fetch(range(first, first + batch))
            return ids.size

        def shuffled_array(first: int, batch: int) -> int:
            last = tokens - SEQUENCE - 1
            starts = [min(last, int(shuffled[(first + i) % windows]) * SEQUENCE) for i in range(batch)]
            rows = np.stack([stream[s : s + SEQUENCE + 1] for s in starts]).astype(np.int64)
            ids, _targets = rows[:, :-1].copy(), rows[:, 1:].copy()
            return ids.size

        for name, way in (("tinyllama Mixture.fetch", ours), ("memmap and a shuffled array", shuffled_array)):
            for batch in (1, 8, 64):
                count, first = 0, 0
                limit = time.perf_counter() + arguments.seconds
                started = time.perf_counter()
                while time.perf_counter() < limit:
                    count += way(first % (windows - batch), batch)
                    first += batch
                speed = count / (time.perf_counter() - started)
                loading.append({"way": name, "batch": batch, "million_tokens_per_s": round(speed / 1e6, 1)})

    show(
        "Opening a store and reading the batch at sample 10^9, in a new process (median of 5)",
        ("tokens", "shards", "open, ms", "seek + batch, ms", "all with imports, ms", "peak, MiB"),
        [
            (
                f"{row['tokens']:.0e}",
                f"{row['shards']:,}",
                f"{row['open_s'] * 1e3:.2f}",
                f"{row['seek_and_batch_s'] * 1e3:.2f}",
                f"{row['total_s'] * 1e3:.0f}",
                f"{row['peak_mib']:.1f}",
            )
            for row in opening
        ],
    )
    show(
        f"Reading batches of {SEQUENCE}-token windows in one process",
        ("", "sequences", "M tokens/s"),
        [(row["way"], str(row["batch"]), f"{row['million_tokens_per_s']:.1f}") for row in loading],
    )
    bytes_each = 8 * 10**13 // SEQUENCE
    print(
        f"a shuffled array for 10^13 tokens would take {bytes_each / 1e9:.0f} GB for each epoch; the permutation, none"
    )
    values = {"sequence_length": SEQUENCE, "opening": opening, "loading": loading, "store_tokens": tokens}
    print(record("data_loading", ("numpy",), values, arguments.output))


if __name__ == "__main__":
    main()
