"""Preparing: the same bytes however it is run, and every document accounted for."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import zstandard
from conftest import content, preparing, tinyllama

from tinyllama.data.documents import Rules
from tinyllama.data.pipeline import share
from tinyllama.data.prepare import prepare
from tinyllama.data.store import TokenStore, read_list, read_manifest


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_do_not_depend_on_workers(inputs, tokenizer, unbroken, tmp_path, workers):
    seen = []
    prepare([inputs], tmp_path / "store", tokenizer, shard_tokens=30_000, workers=workers, progress=seen.append)
    assert content(tmp_path / "store") == unbroken
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "tokenizer.model"]
    assert seen[-1].read_bytes == seen[-1].total_bytes == sum(path.stat().st_size for path in inputs.iterdir())
    assert seen[-1].files == seen[-1].total_files == 10


def test_bytes_do_not_depend_on_the_cache_of_words(inputs, tokenizer, unbroken, tmp_path):
    prepare([inputs], tmp_path / "store", tokenizer, shard_tokens=30_000, workers=0, plain=True)
    assert content(tmp_path / "store") == unbroken


def test_skipped_records_are_listed_with_their_reasons(tmp_path, tokenizer_model):
    rows = [
        '{"text": "one"}',
        '{"text": ',
        '{"text": ""}',
        '{"text": "two"}',
        '{"other": 1}',
        '{"text": "%s"}' % ("x" * 300),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    more = ["--bad-records", "skip", "--max-document-bytes", "200", "--validation-fraction", "0", "--workers", "0"]
    done = tinyllama(*preparing(tmp_path / "a.jsonl", tmp_path / "store", tokenizer_model), *more)
    assert "skipped: 4 records" in done.stdout
    skipped = list(read_list(tmp_path / "store", "skipped.jsonl"))
    assert [entry["record"] for entry in skipped] == [1, 2, 4, 5]
    assert ["not valid JSON" in skipped[0]["reason"], skipped[1]["reason"]] == [True, "empty"]
    assert read_manifest(tmp_path / "store").documents("train") == 2


def test_the_preset_excludes_and_counts(tmp_path, tokenizer_model):
    rows = [
        {"text": f"document {i}", "meta": {"redpajama_set_name": "RedPajamaGithub" if i % 3 == 0 else "RedPajamaC4"}}
        for i in range(30)
    ]
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "in" / "0.jsonl.zst").write_bytes(zstandard.compress(lines))
    arguments = preparing(tmp_path / "in", tmp_path / "store", tokenizer_model)
    done = tinyllama(*arguments, "--preset", "slimpajama", "--json", "--workers", "0")
    found = json.loads(done.stdout)
    assert found["inputs"]["excluded"] == {"meta.redpajama_set_name=RedPajamaGithub": 10}
    assert sum(split["documents"] for split in found["splits"].values()) == 20


def test_shares_of_tasks_are_whole_and_even():
    sizes = [random.Random(1).randint(1, 1000) for _ in range(500)]
    for tasks in (1, 2, 7, 64):
        shares = [share(sizes, rank, tasks) for rank in range(tasks)]
        assert sorted(index for mine in shares for index in mine) == list(range(500))
        loads = [sum(sizes[index] for index in mine) for mine in shares]
        assert max(loads) - min(loads) <= 1000


def test_large_documents_do_not_need_large_memory(tokenizer_model, tmp_path):
    """One worker's peak, for a text of 12 MB in one document; see docs/data.md for the bound."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words of a very long book\n" * 400_000}) + "\n")
    program = (
        "import sys; from tinyllama.data.prepare import prepare;"
        "from tinyllama.tokenizer.sentencepiece_model import Tokenizer;"
        "prepare([sys.argv[1]], sys.argv[2], Tokenizer.load(sys.argv[3]), workers=0, validation_fraction=0);"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    command = [sys.executable, "-c", program, tmp_path / "a.jsonl", tmp_path / "store", tokenizer_model]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < 512
    assert TokenStore(tmp_path / "store").num_documents == 1


def test_ray_writes_the_same_bytes(inputs, tokenizer_model, unbroken, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'tinyllama[ray]'")
    arguments = preparing(inputs, tmp_path / "store", tokenizer_model)
    tinyllama(*arguments, "--shard-tokens", "30000", "--executor", "ray", "--tasks", "3")
    assert content(tmp_path / "store") == unbroken


def test_rules_reach_the_workers(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    prepare(
        [tmp_path / "a.jsonl"], tmp_path / "store", tokenizer, rules=Rules("body"), validation_fraction=0, workers=1
    )
    assert TokenStore(tmp_path / "store").num_documents == 2
