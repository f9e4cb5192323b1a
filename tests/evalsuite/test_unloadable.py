"""Models whose small files pass the first look and which transformers still cannot make: one line, before the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_llama

from evalsuite import backends, native, parity
from tinyllama.errors import UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama.build(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **fields}))


def _unknown_model(model: Path) -> None:
    kind = json.loads((model / "tokenizer.json").read_text())["model"]
    change(model / "tokenizer.json", model={**kind, "type": "Unheard"})


def _sentencepiece(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\0no model" * 40)


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "tokenizer.json of an unknown model": _unknown_model,
    "an unknown pre-tokenizer": lambda model: change(model / "tokenizer.json", pre_tokenizer={"type": "Unheard"}),
    "a tokenizer.model that is none": _sentencepiece,
    "a number for a token": lambda model: change(model / "tokenizer_config.json", bos_token=5),
    "a text for an id": lambda model: (model / "added_tokens.json").write_text('{"<x>": "y"}'),
}


@pytest.mark.parametrize("damage", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("backend", ["native", "hf"])
def test_a_tokenizer_that_cannot_be_made(model: Path, damage, backend, tmp_path, monkeypatch: pytest.MonkeyPatch):
    damage(model)
    for loads in ("load_model", "Copies"):
        monkeypatch.setattr(native, loads, lambda *_: pytest.fail("the weights were loaded"))
    for copies in (1, 2) if backend == "native" else (1,):
        choice = backends.choose(str(model), backend, "float32", 1, None, copies)
        with pytest.raises(UserError) as caught:
            backends.make(choice, tmp_path)
        assert "\n" not in str(caught.value)
        assert ("cannot read its tokenizer" if backend == "native" else "cannot load") in str(caught.value)
        with pytest.raises(UserError, match="cannot read its tokenizer"):
            parity.expected(choice)


def test_a_configuration_that_transformers_alone_cannot_use(model: Path, tmp_path: Path):
    for fields in ({"return_dict": False}, {"id2label": 5}, {"_attn_implementation": "unheard"}):
        shutil.copytree(model, tmp_path / "copy")
        change(tmp_path / "copy" / "config.json", **fields)
        choice = backends.choose(str(tmp_path / "copy"), "native", "float32", 1, None)
        with pytest.raises(UserError, match="transformers cannot"):
            parity.expected(choice)
        shutil.rmtree(tmp_path / "copy")


def test_shards_that_only_vllm_would_read(model: Path):
    """It prefers consolidated*.safetensors, which transformers and ours never read."""
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    for backend in ("native", "hf"):
        backends.choose(str(model), backend, "float32", 1, None)
    with pytest.raises(UserError, match="two sets of weights, and vLLM would read consolidated"):
        backends.choose(str(model), "vllm", "float32", 1, None)
