"""Drafts and quantized models in vLLM: mistakes in one line, the arithmetic, and what real engines compute with them."""

from __future__ import annotations

import json
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, tinyllama
from safetensors.torch import load_file, save_file
from tiny_llama import build

from serve import prompts, speculative
from serve.schemes import refuse_what_cannot_run, slow_here
from serve.source import resolve
from tinyllama.errors import ConfigError, UserError
from tinyllama.model.hf import load_model
from tinyllama.quantize import quantize_directory

PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 3, 40, 24
ENGINE = """
import json, sys
from pathlib import Path
from serve.engine import EngineConfig, importable_vllm, open_engine, vllm_log
from serve.source import resolve
from serve.speculative import Draft
model, draft, dtype, prompts, tokens, folder = json.loads(sys.argv[1])
log = Path(folder) / "vllm.log"
with importable_vllm(), vllm_log(log) as terminal:
    chosen = Draft(3, resolve(draft, print)) if draft else None
    config = EngineConfig(model, len(prompts), dtype, 128, 8 << 20, eager=True, draft=chosen)
    with open_engine(config, log) as engine:
        from vllm import SamplingParams, TokensPrompt
        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        scored = engine._llm.generate(inputs, SamplingParams(max_tokens=1, prompt_logprobs=0))
        found = [[o.prompt_logprobs[i][t].logprob for i, t in enumerate(o.prompt_token_ids) if i] for o in scored]
        batch = engine.run(prompts, tokens, temperature=0.0)
        counters = engine.speculation()
    (Path(folder) / "found.json").write_text(json.dumps([found, batch.tokens, counters]))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "target", dtype="float32")


@pytest.fixture(scope="module")
def small(target, tmp_path_factory) -> Path:
    """The target without its second layer: it often guesses right, and often does not."""
    directory = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(target, directory)
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return directory


@pytest.fixture(scope="module")
def quantized(target, tmp_path_factory):
    """Quantized copies of the target, by scheme, made once each."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = folder / scheme
            quantize_directory(target, made[scheme], scheme, check=False, report=lambda _: None)
        return made[scheme]

    return get


def ids() -> list[list[int]]:
    return prompts.random_ids(random.Random(5), PROMPTS, PROMPT_TOKENS, 384)


def in_vllm(model: Path, draft: Path | None, dtype: str, folder: Path) -> tuple[torch.Tensor, list[list[int]], Any]:
    """Log-probabilities of the prompts, greedy continuations, and the counters of drafting, from one engine."""
    given = [str(model), draft and str(draft), dtype, ids(), OUTPUT_TOKENS, str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps(given)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    logprobs, tokens, counters = json.loads((folder / "found.json").read_text())
    return torch.tensor(logprobs), tokens, counters


@torch.no_grad()
def ours(model: Path) -> torch.Tensor:
    batch = torch.tensor(ids())
    scores = load_model(model)(batch).log_softmax(-1)
    return scores[:, :-1].gather(2, batch[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def greedy(model: Path) -> list[list[int]]:
    """The most likely continuation, in our own Llama, without a cache."""
    llama, batch = load_model(model), torch.tensor(ids())
    for _ in range(OUTPUT_TOKENS):
        batch = torch.cat((batch, llama(batch)[:, -1:].argmax(-1)), 1)
    return batch[:, PROMPT_TOKENS:].tolist()


def test_a_draft_changes_nothing_but_the_number_of_passes(target, small, tmp_path):
    logprobs, tokens, counters = in_vllm(target, small, "float32", tmp_path)
    assert tokens == greedy(target)
    torch.testing.assert_close(logprobs, ours(target), rtol=0, atol=1e-4)
    assert counters["num_draft_tokens"] == 3 * counters["num_drafts"] > 0
    assert 0 < counters["num_accepted_tokens"] == sum(counters["accepted_at_position"]) < counters["num_draft_tokens"]


@pytest.mark.slow  # minutes, of which vLLM compiles most; int8 runs in vLLM below
@pytest.mark.parametrize("scheme", ["fp8", "int4-weights"])
def test_vllm_computes_what_our_llama_computes_of_a_quantized_model(quantized, target, scheme, tmp_path):
    """Up to rounding: one step of an input, where two orders of summing fall on two sides of a half, moves all behind it."""
    logprobs, _, _ = in_vllm(quantized(scheme), None, "float32" if scheme == "fp8" else "bfloat16", tmp_path)
    own, plain = (logprobs - ours(quantized(scheme))).abs(), (logprobs - ours(target)).abs()
    assert own.max() < 0.06
    assert own.mean() < 0.8 * plain.mean()


@pytest.fixture(scope="module")
def measured(quantized, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """One `tinyllama serve` of an int8 model with an n-gram draft on a text."""
    output = tmp_path_factory.mktemp("bench") / "int8"
    arguments = [
        "--batch-sizes",
        "1,4",
        "--input-tokens",
        24,
        "--output-tokens",
        16,
        "--repeats",
        2,
        "--eager",
        "--measure",
        "offline",
    ]
    arguments += ["--latency-requests", 3, "--draft", "ngram", "--draft-tokens", 2]
    arguments += ["--prompts", string.__file__, "--temperature", 0, "--json"]
    done = tinyllama("serve", quantized("int8"), "--output", output, *arguments, timeout=300)
    return output, json.loads(done.stdout)


def test_bench_says_what_was_quantized_and_drafted(measured, quantized):
    output, bench = measured
    model, settings, found = bench["model"], bench["settings"], bench["speculative"]
    record = json.loads((quantized("int8") / "tinyllama_export.json").read_text())
    assert model["content_sha256"] == record["content_sha256"]
    assert model["quantization"] == {
        "scheme": "int8",
        "description": "8-bit int weights by channel, int8 inputs by token",
        "weight_bytes": record["quantization"]["bytes_after"],
    }
    assert bench["roofline"]["weight_bytes"] == record["quantization"]["bytes_after"]
    assert not any("bytes_per_s" in point for point in bench["throughput"])  # a pass gives more than one token
    assert (settings["quantization"], settings["speculative"]) == ("int8", "ngram x2")
    assert (settings["draft"]["method"], settings["draft"]["num_tokens"]) == ("ngram", 2)
    assert (settings["temperature"], settings["prompts_file"]) == (0.0, string.__file__)
    assert found["num_draft_tokens"] <= 2 * found["num_drafts"]
    assert found["num_accepted_tokens"] <= found["num_draft_tokens"]
    table = (output / "table.md").read_text()
    assert ", int8" in table
    assert "Speculative decoding, drafts of 2 tokens by ngram" in table
    assert "24 prompt tokens of a text" in table


def test_acceptance_by_hand():
    def metric(name: str, value: Any) -> SimpleNamespace:
        key = "values" if isinstance(value, list) else "value"
        return SimpleNamespace(name=f"vllm:spec_decode_{name}", **{key: value})

    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    before = speculative.count([metric(n, v) for n, v in zip(names, (10, 30, 9, [6, 2, 1]), strict=True)])
    after = speculative.count([metric(n, v) for n, v in zip(names, (18, 54, 21, [12, 6, 3]), strict=True)])
    found = speculative.acceptance(before, after)
    assert found["acceptance_rate"] == 12 / 24
    assert found["tokens_per_step"] == 1 + 12 / 8
    assert found["at_position"] == [6 / 8, 4 / 8, 2 / 8]
    line = speculative.line(found, {"num_tokens": 3, "name": "small"})
    assert "50% of the drafted tokens accepted, 2.50 tokens for each pass" in line
    nothing = speculative.acceptance(speculative.count([]), speculative.count([]))
    assert nothing["acceptance_rate"] is None
    assert "nothing was drafted" in speculative.line(nothing, {"num_tokens": 3, "name": "small"})


def test_windows_are_of_the_text():
    ids = list(range(100))
    found = prompts.windows(random.Random(1), 50, 10, ids)
    assert all(window == list(range(window[0], window[0] + 10)) for window in found)
    assert prompts.windows(random.Random(1), 2, 100, ids) == [ids, ids]


def refused(*arguments: object) -> str:
    import typer
    from typer.testing import CliRunner

    from serve.cli import serve_command

    app = typer.Typer()
    app.command()(serve_command)
    found = CliRunner().invoke(app, [str(argument) for argument in arguments]).exception
    assert isinstance(found, UserError), found
    return str(found)


def test_mistakes_with_drafts(target, small, tmp_path):
    assert "--draft-tokens 0" in refused(target, "--draft", "ngram", "--draft-tokens", 0)
    assert "nothing does not exist" in refused(target, "--draft", tmp_path / "nothing")
    assert "--temperature 3.0" in refused(target, "--temperature", 3)
    assert "cannot be read" in refused(target, "--prompts", tmp_path / "nothing")
    other = tmp_path / "other"
    shutil.copytree(small, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    assert "model.embed_tokens.weight has shape (384, 128), the configuration says (512, 128)" in refused(
        target, "--draft", other
    )
    weights = load_file(other / "model.safetensors")
    for name, rows in weights.items():
        if rows.shape[0] == 384:
            weights[name] = torch.cat((rows, rows[:128]))
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = refused(target, "--draft", other)
    assert "--draft other has a vocabulary of 512 tokens, target one of 384" in line
    shutil.copyfile(small / "config.json", other / "config.json")
    shutil.copyfile(small / "model.safetensors", other / "model.safetensors")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    first, second = list(pieces)[10:12]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer than target" in refused(target, "--draft", other)


def test_what_vllm_cannot_run_on_a_cpu_is_refused_at_once(quantized):
    eight, four = resolve(str(quantized("int8-weights")), print), resolve(str(quantized("int4-weights")), print)
    with pytest.raises(ConfigError, match=r"int8-weights: vLLM has no kernel for 8-bit weights .* --quantize int8, or"):
        refuse_what_cannot_run(eight, None, on_cpu=True)
    with pytest.raises(ConfigError, match=r"int4-weights.* float32 on a CPU; give --dtype bfloat16"):
        refuse_what_cannot_run(four, "float32", on_cpu=True)
    refuse_what_cannot_run(four, None, on_cpu=True)
    refuse_what_cannot_run(eight, None, on_cpu=False)
    eight_bits = resolve(str(quantized("int8")), print)
    refuse_what_cannot_run(eight_bits, "float32", on_cpu=True)
    assert eight_bits.rounds_inputs
    assert not four.rounds_inputs


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_fp8_on_a_cpu_is_told_to_be_slow(quantized):
    assert "emulated" in str(slow_here(resolve(str(quantized("fp8")), print)))
    assert slow_here(resolve(str(quantized("int8")), print)) is None


def test_server_gets_the_draft_as_json(target, small):
    from serve.engine import EngineConfig
    from serve.server import command

    draft = speculative.resolve(str(small), 3, resolve(str(target), print), print)
    line = command(EngineConfig(str(target), 4, eager=True, draft=draft), "name", "127.0.0.1", 1)
    given = json.loads(line[line.index("--speculative-config") + 1])
    assert given == {"method": "draft_model", "model": str(small), "num_speculative_tokens": 3}
