"""Each kernel that a device has, in bf16 and at the shapes of the 1.1B model's heads, against fp32."""

from __future__ import annotations

import pytest
import torch
from gpu_devices import each_device, relative_error, slow_on_cpu
from test_kernels import REFERENCES, values_and_gradients
from test_packed_documents import alone, given, numbers, passes

from tinyllama.model.config import ModelConfig
from tinyllama.model.kernels import TABLE, Setting, choose
from tinyllama.model.llama import Llama
from tinyllama.model.ops import IGNORE_INDEX

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 512, 32, 4, 64
HIDDEN, FEED_FORWARD, VOCABULARY = 256, 704, 2048
DIFFERENTIABLE = {"attention": 3, "norm": 2, "rotary": 2, "swiglu": 1, "loss": 2}
MOST = 1.5e-2  # bf16 has 8 bits: 0.4% a rounding


def of_model_shape(operation: str) -> list:
    """fp32 inputs; heads are views of (B, T, H * D), as the projections leave them."""
    torch.manual_seed(0)

    def heads(number: int) -> torch.Tensor:
        return torch.randn(BATCH, LENGTH, number * WIDTH).view(BATCH, LENGTH, number, WIDTH).transpose(1, 2)

    if operation == "attention":
        return [heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)]
    if operation == "norm":
        return [torch.randn(BATCH, LENGTH, HIDDEN) * 3, torch.rand(HIDDEN) + 0.5, 1e-5]
    if operation == "rotary":
        angles = torch.arange(LENGTH)[:, None] / 10_000 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
        angles = torch.cat((angles, angles), 1)[None, None]  # (1, 1, T, D)
        return [heads(HEADS), heads(KV_HEADS), angles.cos(), angles.sin()]
    if operation == "swiglu":
        return [torch.randn(BATCH, LENGTH, 2 * FEED_FORWARD)]
    targets = torch.randint(0, VOCABULARY, (BATCH * LENGTH,))
    targets[::9] = IGNORE_INDEX
    return [torch.randn(BATCH * LENGTH, HIDDEN), torch.randn(VOCABULARY, HIDDEN) * 0.2, targets]


@each_device
@pytest.mark.parametrize(("operation", "name"), [(o, n) for o, names in TABLE.items() for n in names])
def test_in_bf16_a_kernel_is_near_its_fp32_reference(operation, name, device):
    setting = Setting(torch.device(device))
    if reason := TABLE[operation][name].missing(setting):
        pytest.skip(f"{name}: {reason}")
    given = of_model_shape(operation)
    expected = values_and_gradients(REFERENCES[operation], given, DIFFERENTIABLE[operation])
    cast = [a.to(device, torch.bfloat16 if a.is_floating_point() else a.dtype) if torch.is_tensor(a) else a
            for a in given]  # fmt: skip
    found = values_and_gradients(TABLE[operation][name].build(setting), cast, DIFFERENTIABLE[operation])
    errors = [relative_error(mine, reference) for mine, reference in zip(found, expected, strict=True)]
    assert max(errors) < MOST, errors


@slow_on_cpu
def test_compiled_blocks_in_bf16_are_as_near_to_fp32_as_eager_ones(device):
    """Loss and every gradient, with the kernels that the choice takes for each."""
    config = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 512, (2, 257), generator=torch.Generator().manual_seed(0)).to(device)

    def loss_and_gradients(dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
        model = Llama(config)
        model.initialize(1)
        model = model.to(device, dtype)
        if dtype == torch.bfloat16:  # the reference has plain torch's: the fastest attention computes in 16 bits only
            model.use(choose({}, Setting(torch.device(device), compiled))[0])
        if compiled:
            model.compile_blocks()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    reference = loss_and_gradients(torch.float32, False)
    eager, compiled = (
        [relative_error(mine, exact) for mine, exact in zip(found, reference, strict=True)]
        for found in (loss_and_gradients(torch.bfloat16, False), loss_and_gradients(torch.bfloat16, True))
    )
    assert compiled[0] < 1e-3
    assert max(eager) < 5e-2, eager
    assert all(mine < 1.5 * other + 5e-3 for mine, other in zip(compiled, eager, strict=True)), (compiled, eager)


@each_device
@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_documents_in_bf16_attend_as_if_each_was_alone(name, device):
    """Values and gradients of attention inside packed documents. FlexAttention's kernels, which it compiles, are a GPU's."""
    setting = Setting(torch.device(device), documents=True)
    if reason := TABLE["attention"][name].missing(setting):
        pytest.skip(f"{name}: {reason}")
    kernels, _ = choose({"attention": name}, setting)
    expected = passes(alone, given(), numbers())
    inputs = [x.to(device, torch.bfloat16) for x in given()]
    found = passes(kernels.attention, inputs, kernels.layout(numbers().to(device)))
    errors = [relative_error(mine, reference) for mine, reference in zip(found, expected, strict=True)]
    assert max(errors) < MOST, errors
