"""Documents to stores: nothing lost, nothing added, any damage found."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tinyllama

from tinyllama.data.documents import find_inputs, read_documents
from tinyllama.data.loader import HeldOut, Mixture, Source
from tinyllama.data.prepare import prepare
from tinyllama.data.store import TokenStore, read_manifest, verify
from tinyllama.errors import DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer

TEXTS = [
    "def f(x):\n    return x\n",
    "Grüße, 世界! 🙂",
    " leading space",
    "a",
    "line\r\nbreaks\n\n\n",
    "1234567890",
] * 20
TEXTS = [f"{i}: {text}" for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_model)


def write_inputs(folder: Path) -> list[Path]:
    """The same texts as every kind of input file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines)
    with gzip.open(folder / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pq.write_table(pa.table({"content": TEXTS}), folder / "d.parquet")
    (folder / "e.txt").write_bytes(TEXTS[0].encode())
    return sorted(folder.iterdir())


def decoded(store: Path, tokenizer: Tokenizer) -> list[str]:
    """Every document of a store, from its tokens."""
    found = []
    for split in ("train", "validation"):
        tokens = TokenStore(store, split)
        for index, shard in enumerate(tokens.shards):
            for number in range(shard.num_documents):
                ids = tokens.document(index, number)
                assert ids[0] == tokenizer.bos_id
                assert tokenizer.bos_id not in ids[1:]
                found.append(tokenizer.decode(ids[1:].tolist()))
    return found


def test_every_kind_of_file_gives_back_every_document(tmp_path, tokenizer):
    for path in write_inputs(tmp_path / "in"):
        expected = TEXTS if path.suffix != ".txt" else TEXTS[:1]
        assert list(read_documents(find_inputs([path])[0])) == expected
    manifest = prepare([tmp_path / "in"], tmp_path / "store", tokenizer, validation_fraction=0.2)
    verify(tmp_path / "store")
    assert sorted(decoded(tmp_path / "store", tokenizer)) == sorted(TEXTS * 4 + TEXTS[:1])
    expected = sum(len(ids) + 1 for ids in tokenizer.encode_batch(TEXTS * 4 + TEXTS[:1], 1))
    assert manifest.tokens("train") + manifest.tokens("validation") == expected


def test_bytes_do_not_depend_on_threads(tmp_path, tokenizer):
    write_inputs(tmp_path / "in")
    hashes = {prepare([tmp_path / "in"], tmp_path / f"s{n}", tokenizer, threads=n).sha256 for n in (1, 2, 5)}
    assert len(hashes) == 1


def test_copies_of_a_document_are_held_out_together(tmp_path, tokenizer):
    write_inputs(tmp_path / "in")
    prepare([tmp_path / "in"], tmp_path / "store", tokenizer, validation_fraction=0.3)
    sides = {}
    for split in ("train", "validation"):
        tokens = TokenStore(tmp_path / "store", split)
        assert tokens.num_tokens
        for index, shard in enumerate(tokens.shards):
            for number in range(shard.num_documents):
                sides.setdefault(tokens.document(index, number).tobytes(), set()).add(split)
    assert all(len(found) == 1 for found in sides.values())


def test_an_interrupted_preparation_continues_to_the_same_bytes(tmp_path, tokenizer):
    inputs = write_inputs(tmp_path / "in")
    whole = prepare([tmp_path / "in"], tmp_path / "whole", tokenizer)

    class Interrupt(Exception):
        pass

    for calls in range(1, len(inputs)):
        count = 0

        def stop(_bytes, _tokens, limit=calls):
            nonlocal count
            count += 1
            if count > limit:
                raise Interrupt

        with pytest.raises(Interrupt):
            prepare([tmp_path / "in"], tmp_path / "part", tokenizer, progress=stop)
        with pytest.raises(DataError, match="not a token store"):
            read_manifest(tmp_path / "part")
    assert prepare([tmp_path / "in"], tmp_path / "part", tokenizer).sha256 == whole.sha256


def test_a_flipped_byte_is_found_and_named(stores, tmp_path):
    for name in sorted(p.name for p in (stores / "prose").iterdir() if p.suffix in (".tokens", ".documents")):
        if not (stores / "prose" / name).stat().st_size:
            continue
        copy = tmp_path / name
        shutil.copytree(stores / "prose", copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        done = tinyllama("data", "verify", copy, check=False)
        assert done.returncode == 2
        assert name in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2"),
        ("b.jsonl", b'{"title": "x"}\n', "no text or content"),
        ("c.jsonl", b'{"text": "\xff"}\n', "c.jsonl:1"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:40], "d.jsonl.gz"),
        ("e.jsonl.zst", b"not zstandard", "e.jsonl.zst"),
        ("f.parquet", b"not parquet", "f.parquet"),
        ("g.txt", b"\xff\xfe\xff", "g.txt"),
    ],
)
def test_broken_input_is_one_clear_line_and_leaves_no_store(tmp_path, tokenizer_model, name, content, words):
    (tmp_path / name).write_bytes(content)
    arguments = ["data", "prepare", tmp_path / name, "--output", tmp_path / "store", "--tokenizer", tokenizer_model]
    done = tinyllama(*arguments, check=False)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "store").exists()


def test_every_number_of_ranks_reads_the_same_batches(stores):
    sources = [Source("prose", stores / "prose", 0.7), Source("code", stores / "code", 0.3)]
    from train.plan import BatchPlan

    steps = {}
    for ranks in (1, 2, 3, 6):
        for micro in (1, 2):
            plan = BatchPlan(micro, 12 // (ranks * micro), ranks, 32)
            mixture = Mixture(sources, 32, seed=5)  # opened anew, as after a resume
            rows = {}
            for rank in range(ranks):
                for micro_step in range(plan.accumulation):
                    samples = plan.samples(7, rank, micro_step)
                    ids, targets = mixture.fetch(samples)
                    rows.update({s: (i.tobytes(), t.tobytes()) for s, i, t in zip(samples, ids, targets, strict=True)})
            assert sorted(rows) == list(range(84, 96))
            steps[ranks, micro] = rows
    first = steps[1, 1]
    assert all(rows == first for rows in steps.values())


def test_held_out_windows_cover_every_target_once(stores):
    held_out = HeldOut(Source("prose", stores / "prose", 1.0), 64)
    ids, targets = held_out.fetch(range(held_out.num_windows + 2))
    store = TokenStore(stores / "prose", "validation")
    expected = store.read(0, store.num_tokens)[1:]
    np.testing.assert_array_equal(targets[targets >= 0], expected)
    assert (targets[-2:] < 0).all()
    assert ids.shape == targets.shape == (held_out.num_windows + 2, 64)


def test_mixed_tokenizers_are_refused(stores, tmp_path):
    shutil.copytree(stores / "code", tmp_path / "code")
    manifest = json.loads((tmp_path / "code" / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (tmp_path / "code" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="tokenizer_sha256"):
        Mixture([Source("prose", stores / "prose", 1), Source("code", tmp_path / "code", 1)], 64, 0)


def test_inspect_shows_what_is_there(stores):
    found = json.loads(tinyllama("data", "inspect", stores / "code", "--json").stdout)
    assert found["splits"]["train"]["documents"] == found["separators"]
    assert sum(row["documents"] for row in found["lengths"]) == found["separators"]
    assert len(found["samples"]) == 3
    assert "import" in "".join(sample["text"] for sample in found["samples"])
    assert "Documents of" in tinyllama("data", "inspect", stores / "code").stdout
