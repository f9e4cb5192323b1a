"""No score of a converted model before it was compared with another implementation of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import random_llama
from conftest import tinyllama

from evalsuite import backends, parity
from tinyllama.errors import UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_llama.build(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def interleaved(llama, tmp_path_factory) -> Path:
    """The classic fault of a conversion: rotary pairs interleaved where the architecture has them in halves."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("interleaved") / "model"
    shutil.copytree(llama, directory)
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if "q_proj" in name or "k_proj" in name:
            heads, width = tensor.shape[0] // 32, tensor.shape[1]
            weights[name] = tensor.view(heads, 2, 16, width).transpose(1, 2).reshape(heads * 32, width).contiguous() * 4
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(("backend", "against"), [("native", "transformers"), ("hf", "native")])
def test_the_same_weights_pass_and_others_do_not(llama, interleaved, tmp_path, backend, against):
    choice = backends.choose(str(llama), backend, "float32", None, None)
    wanted = parity.expected(choice)
    model = backends.make(choice, tmp_path)
    found = parity.compare(model, wanted, choice)
    assert found["with"] == against
    assert found["largest_logprob_difference"] < 1e-4
    assert found["positions"] > 60
    assert found["greedy_positions"] >= 4 * parity.GREEDY_TOKENS
    assert model.num_truncated == 0
    others = parity.expected(backends.choose(str(interleaved), backend, "float32", None, None))
    with pytest.raises(UserError, match="do not compute the same model"):
        parity.compare(model, others, choice)


def test_the_results_say_it(llama, tmp_path):
    arguments = ["eval", "--model", llama, "--tasks", "piqa", "--data-dir", "mini", "--limit", 2, "--output", tmp_path]
    done = tinyllama(*arguments)
    assert "checked against transformers: " in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["parity"]["compared"]
    # A file without the comparison, and one whose comparison was made by another version: both are compared anew.
    other = {**found["versions"], "torch": "1.0"}
    for changed in ({"parity": None}, {"versions": other}):
        (tmp_path / "results.json").write_text(json.dumps({**found, "tasks": {}, **changed}))
        assert "checked against transformers: " in tinyllama(*arguments).stdout
    again = tinyllama(*arguments, "--no-parity-check")
    assert "kept" in again.stderr
    assert json.loads((tmp_path / "results.json").read_text())["parity"] == found["parity"]
    tinyllama(*arguments, "--no-parity-check", "--no-resume")
    assert json.loads((tmp_path / "results.json").read_text())["parity"] == {
        "compared": False,
        "reason": "--no-parity-check",
    }


@pytest.mark.parametrize(
    ("changes", "compared"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"num_key_value_heads": 2}, True),  # as many as heads, which null means too
        ({"attention_bias": True}, False),
        ({"mlp_bias": True, "tie_word_embeddings": True}, False),
        ({"head_dim": 16}, False),
    ],
)
def test_what_transformers_computes_is_not_refused_for_what_ours_does_not(tmp_path, changes, compared):
    """Compared where ours can compute it; else the results say why not, and hf scores it."""
    directory = random_llama.build(tmp_path / "model", 64, **changes)
    if changes == {"num_key_value_heads": 2}:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None}))
    choice = backends.choose(str(directory), "hf", "float32", None, None)
    found = parity.not_compared(choice, backends.content_sha256(choice))
    model = backends.make(choice, tmp_path)
    if found is None:
        found = parity.compare(model, parity.expected(choice), choice)
        assert found["largest_logprob_difference"] < 1e-4
        assert found["positions"] > 60
    else:
        assert f"ours does not compute ({directory / 'config.json'}: {next(iter(changes))}=" in found["reason"]
        assert parity.sentence(found).startswith("not checked against another implementation: a Llama that ours ")
    assert found["compared"] == compared
    (score, _), *_ = model.loglikelihood(random_llama.asked("loglikelihood", [("def", " f")]))
    assert score < 0


@pytest.mark.parametrize("max_length", [1, 2, 5, 8, 12])
def test_a_short_context_is_compared_within_itself(llama, tmp_path, max_length):
    for backend in ("native", "hf"):
        choice = backends.choose(str(llama), backend, "float32", None, max_length)
        found = parity.compare(backends.make(choice, tmp_path), parity.expected(choice), choice)
        assert found["positions"] >= 4 * min(max_length, parity.GREEDY_TOKENS)


def test_a_comparison_that_fails_names_its_option(tmp_path):
    """transformers fills what is missing with random weights; ours says so."""
    from safetensors.torch import load_file, save_file

    from evalsuite import runner, suites

    directory = random_llama.build(tmp_path / "model", 64)
    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    choice = backends.ModelChoice(str(directory), "hf", "float32", None)
    request = runner.Request(choice, suites.select("piqa"), "mini", None, tmp_path / "out")
    with pytest.raises(UserError, match=r"model\.norm\.weight.*; or use --no-parity-check"):
        runner._proven_model(request, {"content_sha256": ""}, {})
