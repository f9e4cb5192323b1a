"""The store: any damage found and named, anything that does not fit refused, opening free of charge at any size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tinyllama
from data_loading import virtual_store

from tinyllama.data.loader import HeldOut, Mixture, Source, document_layout
from tinyllama.data.prepare import prepare
from tinyllama.data.store import (
    TokenStore,
    file_sha256,
    read_list,
    read_manifest,
    verify,
)
from tinyllama.errors import ConfigError, DataError
from tinyllama.tokenizer.sentencepiece_model import Tokenizer


@pytest.fixture(scope="module")
def store(corpus: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose in several shards, cut inside documents."""
    path = tmp_path_factory.mktemp("store") / "prose"
    prepare(
        [corpus / "prose.jsonl"],
        path,
        Tokenizer.load(tokenizer_model),
        validation_fraction=0.1,
        shard_tokens=20_011,
        workers=0,
    )
    return path


def test_the_format_is_what_the_documentation_says(store):
    """Reads the store with nothing but json and numpy, as docs/data.md shows."""
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["format"] == "tinyllama-token-store"
    shards = [json.loads(line) for line in (store / "shards.jsonl").read_text().splitlines()]
    train = [shard for shard in shards if shard["split"] == "train"]
    assert len(train) > 3
    assert {shard["num_tokens"] for shard in train[:-1]} == {20_011}
    stream = np.concatenate([np.fromfile(store / f"{s['name']}.tokens", dtype=manifest["dtype"]) for s in train])
    starts = np.concatenate(
        [
            np.fromfile(store / f"{s['name']}.documents", dtype="<u8") + n * manifest["shard_tokens"]
            for n, s in enumerate(train)
        ]
    )
    assert len(stream) == manifest["splits"]["train"]["tokens"]
    assert len(starts) == manifest["splits"]["train"]["documents"]
    np.testing.assert_array_equal(np.flatnonzero(stream == manifest["separator_id"]), starts)
    opened = TokenStore(store)
    np.testing.assert_array_equal(opened.read(0, opened.num_tokens), stream)
    np.testing.assert_array_equal(opened.read(20_000, 50_000), stream[20_000:70_000])
    np.testing.assert_array_equal(opened.shard(1), stream[20_011:40_022])
    for document, begin in zip(opened.documents(), starts, strict=True):
        np.testing.assert_array_equal(document, stream[begin : begin + len(document)])


def test_the_reader_in_the_documentation_works(store):
    text = (ROOT / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(code.replace("STORE", str(store)), names)
    opened = TokenStore(store)
    np.testing.assert_array_equal(names["read"](19_000, 45_000), opened.read(19_000, 45_000))
    np.testing.assert_array_equal(names["first_document"], next(opened.documents()))
    # The checksum of the manifest, by its description.
    values = json.loads((store / "manifest.json").read_text())
    digest = values.pop("sha256")
    del values["format"], values["version"]
    assert hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest() == digest


def test_provenance_is_complete(store, corpus):
    (entry,) = read_list(store, "inputs.jsonl")
    source = corpus / "prose.jsonl"
    assert (entry["name"], entry["bytes"], entry["sha256"]) == (
        "prose.jsonl",
        source.stat().st_size,
        file_sha256(source),
    )
    assert entry["records"] == len(source.read_text().splitlines())
    assert sum(split["documents"] for split in entry["splits"].values()) == entry["records"] - entry["skipped"]


def test_a_flipped_byte_is_found_and_named(store, tmp_path):
    names = [path.name for path in sorted(store.iterdir()) if path.name != "prepared.json" and path.stat().st_size]
    assert len(names) > 12
    shutil.copytree(store, tmp_path / "copy")
    verify(tmp_path / "copy")
    for name in names:
        path = tmp_path / "copy" / name
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=re.escape(name)):
                verify(tmp_path / "copy")
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=re.escape(name)):
            verify(tmp_path / "copy")
        path.write_bytes(whole)
    verify(tmp_path / "copy")


def test_verify_names_the_first_bad_shard_in_one_line(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    for number in (3, 1, 2):
        path = tmp_path / "copy" / f"train-{number:06d}.tokens"
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    done = tinyllama("data", "verify", tmp_path / "copy", check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "train-000001.tokens" in line
    (tmp_path / "copy" / "train-000000.tokens").unlink()
    assert "train-000000.tokens is missing" in tinyllama("data", "verify", tmp_path / "copy", check=False).stderr


def test_a_shard_of_another_size_or_none_is_refused_before_anything_is_read(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    path = tmp_path / "copy" / "train-000002.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    opened = TokenStore(tmp_path / "copy")
    with pytest.raises(DataError, match=r"train-000002\.tokens has 40,020 bytes, the manifest says 40,022"):
        opened.check_sizes()
    with pytest.raises(DataError, match=r"train-000002\.tokens"):
        opened.read(0, opened.num_tokens)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000002\.tokens is missing"):
        opened.check_sizes()
    arguments = ["train", "--data", tmp_path, "--output", tmp_path / "run", "--recipe", "demo"]
    arguments += ["--set", 'data.sources=[{"name": "copy", "weight": 1}]', "--set", "model.vocab_size=600"]
    arguments += ["--set", "data.max_epochs=1000"]
    done = tinyllama(*arguments, check=False)
    assert done.returncode == 2
    assert "train-000002.tokens is missing" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ('{"format": "other"}', "is not of format"),
        ('{"format": "tinyllama-token-store", "version": 1}', "version 2"),
        ('{"format": "tinyllama-token-store", "version": 2}', "lacks a field"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path, content, words):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize("field", ["tokenizer_sha256", "separator_policy", "separator_id"])
def test_stores_that_do_not_belong_together_are_refused(stores, tmp_path, field):
    shutil.copytree(stores / "code", tmp_path / "code")
    other = dataclasses.replace(read_manifest(stores / "code"), **{field: 2 if field == "separator_id" else "other"})
    (tmp_path / "code" / "manifest.json").write_text(other.to_json())
    with pytest.raises(DataError, match=field):
        Mixture([Source("prose", stores / "prose", 1), Source("code", tmp_path / "code", 1)], 64, 0)


def test_repetition_beyond_the_cap_is_refused(stores):
    mixture = Mixture([Source("prose", stores / "prose", 0.7), Source("code", stores / "code", 0.3)], 64, 0)
    windows = mixture.order.windows
    samples = int(4 * windows[0] / 0.7)
    mixture.check_epochs(samples - 10, 4.0)
    with pytest.raises(ConfigError, match=r"'prose' would be repeated 4.*Muennighoff"):
        mixture.check_epochs(samples + 10, 4.0)


def test_held_out_windows_cover_every_target_once(stores):
    held_out = HeldOut(Source("prose", stores / "prose", 1.0), 64)
    ids, targets = held_out.fetch(range(held_out.num_windows + 2))
    store = TokenStore(stores / "prose", "validation")
    expected = store.read(0, store.num_tokens)[1:]
    np.testing.assert_array_equal(targets[targets >= 0], expected)
    assert (targets[-2:] < 0).all()
    assert ids.shape == targets.shape == (held_out.num_windows + 2, 64)


def test_document_layout():
    ids = np.array([[7, 8, 1, 9, 9, 1], [1, 7, 7, 7, 7, 7], [7, 7, 7, 7, 7, 7]])
    documents, positions = document_layout(ids, 1)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("exponent", [7, 9, 11, 13])
def test_opening_and_seeking_cost_the_same_at_any_size(tmp_path, exponent):
    """Fault 8: TinyLlama replayed every batch. Here sample 10**9 is a seek: below 1 s and 100 MB, whatever the size."""
    path = tmp_path / "virtual"
    # Large shards, so that the test does not make thousands of files; benchmarks/data_loading.py has those.
    virtual_store(path, 10**exponent, shard_tokens=1 << 36)
    program = (
        "import time; begin = time.process_time();"
        "from tinyllama.data.loader import Mixture, Source; from pathlib import Path;"
        f"mixture = Mixture([Source('a', Path({str(path)!r}), 1.0)], 2048, 1);"
        "ids, targets = mixture.fetch(range(10**9, 10**9 + 8)); assert ids.shape == (8, 2048);"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(time.process_time() - begin, int(peak.split()[1]) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 1
    assert megabytes < 100


def test_inspect_shows_what_is_there(store, tokenizer_model, tmp_path):
    found = json.loads(
        tinyllama("data", "inspect", store, "--json", "--samples", "5", "--tokenizer", tokenizer_model).stdout
    )
    assert found["splits"]["train"]["documents"] == found["separators"]
    assert sum(row["documents"] for row in found["lengths"]) == found["separators"]
    assert found["special_tokens"]["bos"] == {"id": 1, "count": found["separators"], "longest_run": 1}
    assert found["special_tokens"]["eos"]["count"] == found["special_tokens"]["unk"]["count"] == 0
    assert found["special_tokens"]["bytes"]["count"] > 0
    tokenizer, opened = Tokenizer.load(tokenizer_model), TokenStore(store)
    documents = list(opened.documents())
    assert len(found["samples"]) == 5
    for sample in found["samples"]:
        ids = documents[sample["document"]]
        assert sample["tokens"] == len(ids)
        assert sample["text"] == tokenizer.decode(ids[1:121].tolist())
    shown = tinyllama("data", "inspect", store, "--tokenizer", tokenizer_model).stdout
    assert "Documents of" in shown
    assert "longest run 1" in shown
    (tmp_path / "tokenizer.model").write_bytes(b"")
    done = tinyllama("data", "inspect", store, "--tokenizer", tmp_path / "tokenizer.model", check=False)
    assert done.returncode == 2
