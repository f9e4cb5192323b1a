"""Matrix products in float8 by torchao: close to bf16 and not bf16, the blocks' alone, and never without gradients.

On a CPU torchao emulates the products: operands are rounded to float8 as on a GPU, sums are fp32.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tinyllama.errors import ConfigError
from tinyllama.model.config import ModelConfig
from tinyllama.model.fp8 import convert, refusal, set_precision
from tinyllama.model.llama import Llama

pytestmark = pytest.mark.usefixtures("torchao")
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
# Half a step of E4M3 (3 bits of fraction) and of E5M2 (2 bits), relative: no value is rounded further, if not subnormal.
E4M3, E5M2 = 2**-4, 2**-3


def build(in_float8: bool) -> Llama:
    model = Llama(CONFIG)
    model.initialize(7)
    model = model.bfloat16().train()
    if in_float8:
        convert(model, CPU, 64)
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(0))


def in_float8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded with one scale for the whole tensor, by hand: the largest value becomes the format's largest."""
    scale = torch.finfo(dtype).max / x.abs().amax().double()
    return (x.float() * scale.float()).to(dtype).float() / scale.float()


def test_a_layer_multiplies_what_float8_leaves_of_its_operands():
    layer = build(True).model.layers[0].self_attn.qkv_proj
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 64, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(32, 96, generator=generator).bfloat16()
    y = layer(x)
    y.backward(upstream)
    x8, w8 = in_float8(x.detach(), torch.float8_e4m3fn), in_float8(layer.weight.detach(), torch.float8_e4m3fn)
    g8 = in_float8(upstream, torch.float8_e5m2)
    for found, expected in ((y, x8 @ w8.t()), (x.grad, g8 @ w8), (layer.weight.grad, g8.t() @ x8)):
        assert ((found.float() - expected).norm() / expected.norm()).item() < 2**-8  # rounded to bf16 once
    exact = x.detach().float() @ layer.weight.detach().float().t()
    assert 0.005 < ((y.float() - exact).norm() / exact.norm()).item() < E4M3


def test_losses_and_gradients_are_close_to_bf16_and_differ_from_it(ids):
    found = []
    for model in (build(False), build(True)):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append((loss, dict(model.named_parameters())))
    (expected, plain), (loss, rounded) = found
    assert loss != expected
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert list(plain) == list(rounded)
    for name, parameter in plain.items():
        error = ((rounded[name].grad - parameter.grad).float().norm() / parameter.grad.float().norm()).item()
        assert 0 < error < 2 * E5M2, name


def test_only_the_blocks_matrices_are_converted_and_the_state_dict_is_the_same(ids):
    model = build(True)
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert converted == {f"model.layers.{index}.{layer}" for index in range(2) for layer in layers}
    hidden = torch.randn(4, 64).bfloat16()
    assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight))
    plain = build(False).state_dict()
    assert list(model.state_dict()) == list(plain)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_passes_without_gradients_multiply_in_bf16(ids):
    with torch.no_grad():
        assert torch.equal(build(True)(ids), build(False)(ids))
    assert not torch.equal(build(True)(ids), build(False)(ids))


@pytest.mark.parametrize(
    ("device", "capability", "sizes", "words"),
    [
        ("cuda", (8, 0), {}, "needs compute capability 8.9, this GPU has 8.0"),
        ("cuda", (9, 0), {"hidden": 2048, "tokens": 8200}, "needs multiples of 16, tokens is 8200"),
        ("cuda", (8, 9), {"tokens": 8192}, None),
        ("cuda", (10, 0), {"tokens": 8192}, None),
        ("cpu", (0, 0), {"tokens": 8192}, None),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(device, capability, sizes, words):
    assert refusal(device, capability, sizes) == words


def test_the_table_names_the_precision_and_float8_needs_bf16_weights():
    model = build(False)
    rows = [set_precision("bf16", bf16, model, CPU, 64) for bf16 in (True, False)]
    assert [(row.operation, row.kernel) for row in rows] == [("matrix products", "bf16"), ("matrix products", "fp32")]
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"Float8Linear"})
    with pytest.raises(ConfigError, match=r"needs bf16 weights; set bf16.enabled"):
        set_precision("fp8", False, model, CPU, 64)
    row = set_precision("fp8", True, model, CPU, 64)
    assert row.kernel == "fp8 tensorwise (torchao)"
    assert "emulated on a CPU" in row.why


def test_sizes_that_do_not_fit_are_an_error_that_names_the_layer():
    with pytest.raises(
        ConfigError, match=r"precision='fp8' needs multiples of 16, micro_batch.* is 72; set training.p"
    ):
        convert(Llama(CONFIG), CPU, 72)
    narrow = Llama(dataclasses.replace(CONFIG, intermediate_size=172))
    with pytest.raises(ConfigError, match=r"the output of model.layers.0.mlp.gate_up_proj is 344"):
        convert(narrow, CPU, 64)


def test_a_converted_block_is_one_graph_to_the_compiler(ids):
    """fullgraph: an error at any break. Float8 without the compiler that fuses its roundings is slower than bf16."""
    model = build(True)
    for layer in model.model.layers:
        layer.compiled = torch.compile(layer.compute, dynamic=False, fullgraph=True, backend="aot_eager")
    expected = build(True)(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), expected)
