"""How fast text becomes tokens on disk: `tinyllama data prepare` against SentencePiece itself and two usual ways.

    python benchmarks/data_prepare.py --tokenizer tokenizer.model --megabytes 60

All rows are measured in one run, on the same documents, with the same number of processes, several times in turn:

- SentencePiece raw: `encode` on lists of texts that are in memory, nothing read, nothing written: the yardstick;
- tinyllama: reading (zst and parquet), tokenizing, hashing, packing, the manifest, and starting the processes;
- tinyllama --plain: the same with SentencePiece alone;
- naive loop: one document at a time, as TinyLlama's scripts do, without their detour through torch tensors;
- datatrove's DocumentTokenizer with the same tokenizer, as a tokenizer.json of proven equal ids.

The text is the Python code and the documentation in it of the standard library and the installed packages, each file
once: unlike a repeated corpus, it goes on bringing words that no cache has seen.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import record, show

FILES = 8  # of each kind


def source_files() -> Iterator[str]:
    """Every distinct Python source of the standard library and the installed packages."""
    seen = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if 200 < len(text) < 1_000_000 and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def docstrings(text: str) -> str:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node)))


def write_corpus(folder: Path, megabytes: int) -> dict[str, list[str]]:
    """Code as parquet and prose as jsonl.zst, `megabytes` of UTF-8 in all; returns the texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder.mkdir(parents=True)
    texts: dict[str, list[str]] = {"code": [], "prose": []}
    sizes = dict.fromkeys(texts, 0)
    for text in source_files():
        for kind, piece in (("code", text), ("prose", docstrings(text))):
            if len(piece) > 200 and sizes[kind] < megabytes * 500_000:
                texts[kind].append(piece)
                sizes[kind] += len(piece.encode())
        if min(sizes.values()) >= megabytes * 500_000:
            break
    for number in range(FILES):
        pq.write_table(pa.table({"content": texts["code"][number::FILES]}), folder / f"code-{number}.parquet")
        lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts["prose"][number::FILES])
        (folder / f"prose-{number}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return texts


def _raw(model: str, texts: list[str], ready: Any, done: Any) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    ready.wait()
    started = time.perf_counter()
    tokens = 0
    for first in range(0, len(texts), 512):
        tokens += sum(map(len, processor.encode(texts[first : first + 512], num_threads=1)))
    done.put((time.perf_counter() - started, tokens))


def raw_encode(model: Path, texts: list[str], processes: int) -> tuple[float, int]:
    """Seconds of the slowest process, and tokens; every process has its texts in memory before the clock starts."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_raw, args=(str(model), texts[n::processes], ready, done)) for n in range(processes)
    ]
    for worker in workers:
        worker.start()
    results = [done.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(seconds for seconds, _ in results), sum(tokens for _, tokens in results)


def _naive(model: str, files: list[str], folder: str) -> None:
    import numpy as np
    import pyarrow.parquet as pq
    import sentencepiece
    import zstandard

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    for file in files:
        with open(Path(folder) / Path(file).name, "wb") as out:
            if file.endswith(".parquet"):
                contents = pq.read_table(file).column("content").to_pylist()
            else:
                with zstandard.open(file, "rt", encoding="utf-8") as stream:
                    contents = [json.loads(line)["text"] for line in stream]
            for text in contents:
                ids = processor.encode(text)
                out.write(np.array([processor.bos_id(), *ids], dtype=np.uint16).tobytes())


def naive_loop(model: Path, files: list[Path], folder: Path, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    shares = [[str(f) for f in files[n::processes]] for n in range(processes)]
    workers = [context.Process(target=_naive, args=(str(model), share, str(folder))) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, tokenizer, out, processes = sys.argv[1:5]
if __name__ == "__main__":
    for reader, name in (
        (ParquetReader(folder, glob_pattern="*.parquet", text_key="content"), "code"),
        (JsonlReader(folder, glob_pattern="*.zst", compression="zstd"), "prose"),
    ):
        step = DocumentTokenizer(f"{out}/{name}", tokenizer_name_or_path=tokenizer, shuffle_documents=False)
        LocalPipelineExecutor([reader, step], tasks=int(processes), logging_dir=f"{out}/logs-{name}").run()
"""


def datatrove_tokenizer(folder: Path, tokenizer: Path, out: Path, processes: int) -> None:
    script = out.parent / "run_datatrove.py"
    script.write_text(DATATROVE)
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, str(script), str(folder), str(tokenizer), str(out), str(processes)],
        check=True,
        env=environment,
        capture_output=True,
    )


WORKER = """
import sys
from pathlib import Path
from tinyllama.data.prepare import prepare
from tinyllama.tokenizer.sentencepiece_model import Tokenizer
prepare([sys.argv[1]], sys.argv[2], Tokenizer.load(sys.argv[3]), workers=0)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model (default: one of 16000 pieces, trained here)")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    from tinyllama.data.prepare import prepare
    from tinyllama.data.store import verify
    from tinyllama.tokenizer.export import tokenizer_json
    from tinyllama.tokenizer.sentencepiece_model import Tokenizer
    from tinyllama.tokenizer.train import train

    with tempfile.TemporaryDirectory(prefix="tinyllama-benchmark-") as scratch:
        root = Path(scratch)
        texts = write_corpus(root / "corpus", arguments.megabytes)
        files = sorted((root / "corpus").iterdir())
        everything = [text for kind in texts.values() for text in kind]
        num_bytes = sum(len(text.encode()) for text in everything)
        model = arguments.tokenizer
        if model is None:
            model = root / "tokenizer.model"
            train([root / "corpus" / "prose-0.jsonl.zst", root / "corpus" / "code-0.parquet"], model, 16000)
        tokenizer = Tokenizer.load(model)
        (root / "tokenizer.json").write_text(json.dumps(tokenizer_json(model), ensure_ascii=False))
        processes = arguments.processes
        tokens: dict[str, int] = {}

        def ours(plain: bool) -> None:
            manifest = prepare([root / "corpus"], root / "store", tokenizer, workers=processes, plain=plain)
            counts = manifest.splits.values()  # type: ignore[union-attr]
            tokens["tinyllama"] = sum(c.tokens - c.documents for c in counts)

        def timed(run: Callable[[], Any]) -> float:
            for left in ("store", "naive", "datatrove"):
                shutil.rmtree(root / left, ignore_errors=True)
            (root / "naive").mkdir()
            (root / "datatrove").mkdir()
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        def raw() -> float:
            seconds, tokens["raw"] = raw_encode(model, everything, processes)
            return seconds

        ways: dict[str, Callable[[], float]] = {
            "SentencePiece raw encode": raw,
            "tinyllama data prepare": lambda: timed(lambda: ours(False)),
            "tinyllama data prepare --plain": lambda: timed(lambda: ours(True)),
            "naive loop, one document at a time": lambda: timed(
                lambda: naive_loop(model, files, root / "naive", processes)
            ),
            "datatrove DocumentTokenizer": lambda: timed(
                lambda: datatrove_tokenizer(root / "corpus", root / "tokenizer.json", root / "datatrove", processes)
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats):
            for name, way in ways.items():
                seconds[name].append(way())
                print(f"{repeat + 1}/{arguments.repeats} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
        assert tokens["raw"] == tokens["tinyllama"], tokens
        timed(lambda: ours(False))
        verify(root / "store")
        shutil.rmtree(root / "store")
        worker = subprocess.run(
            [sys.executable, "-c", WORKER, str(root / "corpus"), str(root / "store"), str(model)],
            capture_output=True,
            text=True,
            check=True,
        )

    base = statistics.median(seconds["SentencePiece raw encode"])
    rows = []
    for name, runs in seconds.items():
        median = statistics.median(runs)
        rows.append(
            {
                "way": name,
                "seconds": [round(run, 3) for run in runs],
                "mb_per_s": round(num_bytes / median / 1e6, 2),
                "million_tokens_per_s": round(tokens["raw"] / median / 1e6, 3),
                "ratio_to_raw": round(base / median, 3),
            }
        )
    show(
        f"{num_bytes / 1e6:.0f} MB in {len(everything):,} documents, {tokens['raw'] / 1e6:.1f}M tokens, "
        f"{processes} processes, median of {arguments.repeats}",
        ("", "MB/s", "M tokens/s", "of raw"),
        [
            (r["way"], f"{r['mb_per_s']:.2f}", f"{r['million_tokens_per_s']:.2f}", f"{r['ratio_to_raw']:.2f}")
            for r in rows
        ],
    )
    peak = int(worker.stdout) / 1024
    print(f"peak memory of one worker over this corpus: {peak:.0f} MiB")
    values = {
        "corpus": {"bytes_of_text": num_bytes, "documents": len(everything), "tokens": tokens["raw"]},
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "processes": processes,
        "repeats": arguments.repeats,
        "rows": rows,
        "peak_worker_mib": round(peak, 1),
    }
    packages = ("sentencepiece", "datatrove", "tokenizers", "pyarrow", "zstandard", "orjson", "numpy")
    print(record("data_prepare", packages, values, arguments.output))


if __name__ == "__main__":
    main()
