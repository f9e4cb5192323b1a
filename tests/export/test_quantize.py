"""Quantized exports: the arithmetic on exact small cases, the files, and what our Llama computes from them."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import tinyllama
from safetensors.torch import load_file, save_file

from tinyllama.errors import CheckpointError, ConfigError, UserError
from tinyllama.export import RECORD, content_sha256
from tinyllama.model import fused, quantized
from tinyllama.model.config import ModelConfig
from tinyllama.model.fused import hf_parameters
from tinyllama.model.hf import load_model
from tinyllama.quantize import SCHEMES, check_weights, compress, quantization, scales, steps_off

SHAPE = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
BF16 = torch.bfloat16


def row(*values: float, width: int = 64) -> torch.Tensor:
    """(1, width): these values, then zeros."""
    return torch.tensor([[*values, *([0.0] * (width - len(values)))]])


def test_int8_by_hand():
    how = quantization("int8", SHAPE)
    weight = row(127.5, -1.0, 0.49, 0.51, 63.5, -127.5)  # a step is 1
    parts = compress(weight, how, BF16)
    assert parts["weight"].dtype == torch.int8
    assert parts["weight_scale"].dtype == torch.float32
    assert parts["weight_scale"].tolist() == [[1.0]]
    # 127.5 rounds to the even 128, which is not there; 63.5 to the even 64
    assert parts["weight"][0, :6].tolist() == [127, -1, 0, 1, 64, -128]
    assert steps_off(weight, how.decompress(parts), parts["weight_scale"], how) == 0.5


def test_int4_by_hand():
    how = quantization("int4-weights", SHAPE)
    assert how.scheme.weights.group_size == 32  # the largest that divides both 64 and 96
    weight = row(*([7.5] * 32), 15.0, -2.0, 0.9)
    parts = compress(weight, how, BF16)
    assert parts["weight_scale"].tolist() == [[1.0, 2.0]]
    assert parts["weight_packed"].shape == (1, 64 // 8)
    assert how.decompress(parts)[0, 30:35].tolist() == [7.0, 7.0, 14.0, -2.0, 0.0]


def test_fp8_by_hand():
    how = quantization("fp8", SHAPE)
    weight = row(448.0, 17.0, 18.9, -0.6, 2**-10)  # a step of the largest is 1; E4M3 has 16, 18, 20 and 0.5625, 0.625
    parts = compress(weight, how, BF16)
    assert parts["weight"].dtype == torch.float8_e4m3fn
    assert how.decompress(parts)[0, :5].tolist() == [448.0, 16.0, 18.0, -0.625, 0.0]
    assert steps_off(weight, how.decompress(parts), parts["weight_scale"], how) == 0.5


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_is_more_than_half_a_step_off_and_the_check_sees_one_that_is(name):
    how = quantization(name, SHAPE)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator) * torch.logspace(-6, 3, 48)[:, None]
    weight[5] = 0
    parts = compress(weight, how, BF16)
    off = steps_off(weight, how.decompress(parts), parts["weight_scale"], how)
    assert 0.4 < off <= 0.5001
    moved = how.decompress(parts)
    moved[7, 3] += 1.1 * parts["weight_scale"].float()[7, 0] * (32 if name == "fp8" else 1)
    assert steps_off(weight, moved, parts["weight_scale"], how) > 0.51


def test_scales_in_bf16_are_rounded_up_so_that_nothing_falls_off_the_grid():
    how = quantization("int8-weights", SHAPE)
    weight = torch.rand(200, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    step = scales(weight, how, BF16)
    assert step.dtype == BF16
    exact = weight.abs().amax(1, keepdim=True) / 127.5
    assert (step.float() >= exact).all()
    assert (step.float() <= exact * (1 + 2**-7)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(bad):
    with pytest.raises(CheckpointError, match="not a finite number"):
        compress(row(1.0, bad), quantization("int8", SHAPE), BF16)


def test_rounding_of_inputs_by_hand():
    x = torch.tensor([[127.0, 0.4, -0.6, 63.5], [0.0, 0.0, 0.0, 0.0], [254.0, 0.9, 1.1, 0.0]])
    assert quantized.round_int8(x).tolist() == [[127, 0, -1, 64], [0, 0, 0, 0], [254, 0, 2, 0]]
    y = torch.tensor([[448.0, 17.0, -18.9, 0.6], [896.0, 34.0, 0.0, 0.0]])
    assert quantized.round_fp8(y).tolist() == [[448, 16, -18, 0.625], [896, 32, 0, 0]]


@pytest.fixture(scope="module", params=["int8", "fp8", "int8-weights", "int4-weights"])
def made(request, export, tmp_path_factory):
    """(scheme, quantized directory, its record) of the exported tiny model."""
    from tinyllama.quantize import export_quantized

    target = tmp_path_factory.mktemp("quantized") / request.param
    return request.param, target, export_quantized(export, target, request.param)


def test_record(made, export):
    name, target, record = made
    assert json.loads((target / RECORD).read_text()) == record
    assert record["content_sha256"] == content_sha256(target)
    found, source = record["quantization"], json.loads((export / RECORD).read_text())
    assert found["scheme"] == name
    assert found["source_content_sha256"] == source["content_sha256"] == content_sha256(export)
    assert (record["step"], record["tokens"]) == (source["step"], source["tokens"])
    tensors = load_file(target / "model.safetensors")
    assert found["bytes_after"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert found["bytes_after"] < found["bytes_before"] == 2 * record["num_parameters"]
    assert 0.4 < found["largest_error_steps"] <= 0.5001
    logits = found["logits"]
    assert 0 < logits["mean_difference"] < logits["max_difference"]
    assert 0 < logits["kl_nats"] < (0.05 if name == "int4-weights" else 0.001)
    assert logits["same_greedy_token"] > 0.8
    assert logits["loss_after"] == pytest.approx(logits["loss_before"], rel=0.02)


def test_embedding_head_and_norms_are_the_sources(made, export):
    _, target, _ = made
    before, after = load_file(export / "model.safetensors"), load_file(target / "model.safetensors")
    plain = [name for name in before if not name.endswith("_proj.weight")]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(plain)
    assert all(torch.equal(before[name].to(BF16), after[name]) for name in plain)
    assert not any(name.endswith("_proj.weight") and after[name].dtype == BF16 for name in after)


@pytest.mark.filterwarnings("ignore:You passed")
def test_transformers_reads_the_same_weights(made):
    """An independent reader: its dequantized matrices are ours, up to the dtype that it multiplies in."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    _, target, _ = made
    ours = load_model(target)
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, quantization_config=config)
    state = theirs.state_dict()
    for name, parameter in hf_parameters(ours):
        torch.testing.assert_close(parameter, state[name].float(), rtol=2**-7, atol=0, msg=name)


def test_a_damaged_weight_is_found(made, export, tmp_path):
    _, target, _ = made
    shutil.copytree(target, tmp_path / "copy")
    tensors = load_file(target / "model.safetensors")
    key = next(k for k in tensors if k.endswith("q_proj.weight_scale"))
    tensors[key] = tensors[key] * 1.2
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    how = quantized.of(tmp_path / "copy")
    assert how.describe() == json.loads((target / RECORD).read_text())["quantization"]["description"]
    with pytest.raises(CheckpointError, match="quantization steps off"):
        check_weights(export, tmp_path / "copy", how)
    del tensors[key]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "copy")


def test_from_a_checkpoint_by_the_command_line(finished_run, tmp_path):
    done = tinyllama("export", finished_run, "--output", tmp_path / "q", "--quantize", "int8")
    assert "int8, 8-bit int weights by channel, int8 inputs by token" in done.stdout
    assert "same most likely token" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["q"]  # the plain export beside it is gone
    record = json.loads((tmp_path / "q" / RECORD).read_text())
    assert (record["step"], record["quantization"]["unquantized_dtype"]) == (9, "bfloat16")
    assert record["content_sha256"] == content_sha256(tmp_path / "q")


def refused(*arguments: object) -> str:
    import typer
    from typer.testing import CliRunner

    from tinyllama.cli.export import export_command

    app = typer.Typer()
    app.command()(export_command)
    found = CliRunner().invoke(app, [str(argument) for argument in arguments]).exception
    assert isinstance(found, UserError)
    return str(found)


def test_mistakes(export, tmp_path):
    assert "did you mean int8?" in refused(export, "--output", tmp_path / "q", "--quantize", "int9")
    assert "is not a model: the folder is empty" in refused(tmp_path, "--output", tmp_path / "q", "--quantize", "int8")
    (tmp_path / "precious").mkdir()
    line = refused(export, "--output", tmp_path / "precious", "--quantize", "int8")
    assert "exists and is not an export" in line
    assert not (tmp_path / "q").exists()


def test_only_quantized_layers_round_their_inputs_and_other_formats_are_refused(made, export, tmp_path):
    """Directories of other tools may leave more layers as they are, or say what this does not read."""
    name, target, _ = made
    directory = tmp_path / "other"
    shutil.copytree(target, directory)
    tensors, plain = load_file(target / "model.safetensors"), load_file(export / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    rest = {k: v for k, v in tensors.items() if not k.startswith(layer)}
    rest[f"{layer}.weight"] = plain[f"{layer}.weight"].to(BF16)
    save_file(rest, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_model(directory)
    ours = [n for n, module in model.named_modules() if module._forward_pre_hooks]
    parts = {n: [part.name.removesuffix(".weight") for part in fused.parts(f"{n}.weight", model.config)] for n in ours}
    hooked = {name for n in ours for name in parts[n] or [n]}
    assert hooked == (quantized.layers(directory) if name in ("int8", "fp8") else set())
    assert layer not in hooked
    config = json.loads((directory / "config.json").read_text())
    for change in ({"format": "marlin-24"}, {"quant_method": "gptq"}, {"config_groups": {"group_0": {"weights": 8}}}):
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (directory / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="--backend vllm"):
            load_model(directory)
    (directory / "config.json").write_text("{")
    line = refused(directory, "--output", tmp_path / "q", "--quantize", "int8")
    assert "is not JSON" in line


def test_twice_is_refused_and_the_source_is_never_replaced(made, export, tmp_path):
    from tinyllama.quantize import export_quantized

    _, target, record = made
    with pytest.raises(ConfigError, match="is quantized already"):
        export_quantized(target, tmp_path / "again", "int8")
    with pytest.raises(ConfigError, match="is the model itself"):
        export_quantized(export, export, "int8")
    assert content_sha256(target) == record["content_sha256"]
    assert not (tmp_path / "again").exists()


def test_shapes_without_groups_are_refused():
    odd = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=88, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ConfigError, match=r"multiples of 32, this model has \[64, 88\]"):
        quantization("int4-weights", odd)
    quantization("int8", odd)
