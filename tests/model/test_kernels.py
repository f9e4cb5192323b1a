"""Every kernel against an fp32 reference, values and gradients; and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tinyllama.errors import ConfigError
from tinyllama.model import ops
from tinyllama.model.config import ModelConfig
from tinyllama.model.kernels import TABLE, Setting, choose
from tinyllama.model.llama import Llama
from tinyllama.model.ops import IGNORE_INDEX
from train.recipe import KERNELS

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH, VOCABULARY = 2, 200, 6, 2, 64, 501  # 200 positions: one and a half blocks
DEVICES = ["cpu"]  # GPUs are hidden from this suite; tests/gpu has the kernels on one
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # of the whole tensor's norm


def reference_attention(q, k, v):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def reference_rotary(q, k, cos, sin):
    """As complex numbers: the pair (i, i + D/2) is turned by one angle."""

    def turn(x):
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[..., :half]
        return torch.cat((turned.real, turned.imag), -1)

    return turn(q), turn(k)


def reference_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def reference_loss(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


REFERENCES: dict[str, Callable] = {
    "attention": reference_attention,
    "norm": reference_norm,
    "rotary": reference_rotary,
    "swiglu": reference_swiglu,
    "loss": reference_loss,
}


def inputs(operation: str) -> list:
    """fp32 inputs as the model makes them; heads are views of (B, T, H * D)."""
    torch.manual_seed(0)

    def heads(number: int) -> torch.Tensor:
        return torch.randn(BATCH, LENGTH, number * WIDTH).view(BATCH, LENGTH, number, WIDTH).transpose(1, 2)

    if operation == "attention":
        return [heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)]
    if operation == "norm":
        return [torch.randn(BATCH, LENGTH, 96) * 3, torch.rand(96) + 0.5, 1e-5]
    if operation == "rotary":
        angles = torch.arange(LENGTH)[:, None] / 100 ** (torch.arange(WIDTH // 2) / WIDTH)
        angles = torch.cat((angles, angles), 1)[None, None]  # (1, 1, T, D)
        return [heads(HEADS), heads(KV_HEADS), angles.cos(), angles.sin()]
    if operation == "swiglu":
        return [torch.randn(BATCH, LENGTH, 176), torch.randn(BATCH, LENGTH, 176)]
    targets = torch.randint(0, VOCABULARY, (BATCH * LENGTH,))
    targets[:30] = IGNORE_INDEX
    targets[-1] = IGNORE_INDEX
    return [torch.randn(BATCH * LENGTH, 96), torch.randn(VOCABULARY, 96) * 0.2, targets]


def values_and_gradients(function: Callable, arguments: list, differentiable: int) -> list[torch.Tensor]:
    leaves = [a.detach().requires_grad_(i < differentiable) if torch.is_tensor(a) and a.is_floating_point() else a
              for i, a in enumerate(arguments)]  # fmt: skip
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    directions = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in outputs]
    torch.autograd.backward(outputs, directions)
    return [o.detach().float().cpu() for o in outputs] + [leaf.grad.float().cpu() for leaf in leaves[:differentiable]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("operation", "name"), [(o, n) for o, names in TABLE.items() for n in names])
def test_a_kernel_equals_its_fp32_reference_in_value_and_gradient(operation, name, dtype, device):
    setting = Setting(torch.device(device))
    if reason := TABLE[operation][name].missing(setting):
        pytest.skip(f"{name}: {reason}")
    if dtype == torch.float32 and (name.startswith("flash") or name == "cudnn"):
        pytest.skip(f"{name} computes in 16 bits only")
    differentiable = {"attention": 3, "norm": 2, "rotary": 2, "swiglu": 2, "loss": 2}[operation]
    given = inputs(operation)
    expected = values_and_gradients(REFERENCES[operation], given, differentiable)
    cast = [a.to(device, dtype if a.is_floating_point() else a.dtype) if torch.is_tensor(a) else a for a in given]
    found = values_and_gradients(TABLE[operation][name].build(setting), cast, differentiable)
    for mine, reference in zip(found, expected, strict=True):
        assert ((mine - reference).norm() / reference.norm()).item() < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("chunk_tokens", [7, 64, 10_000])
def test_the_loss_does_not_depend_on_its_chunks(chunk_tokens):
    hidden, weight, targets = inputs("loss")
    expected = values_and_gradients(reference_loss, [hidden, weight, targets], 2)

    def loss(hidden, weight, targets):
        return (
            ops.chunked_loss(hidden, weight, targets, chunk_tokens=chunk_tokens) / 3
        )  # a factor reaches the gradients

    found = values_and_gradients(loss, [hidden, weight, targets], 2)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine * 3, reference, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ops.chunked_loss(hidden, weight, targets, chunk_tokens=chunk_tokens), expected[0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_blocked_attention_keeps_the_probabilities_of_half_the_square_in_the_dtype_of_its_inputs(compiled):
    attention = torch.compile(ops.blocked_attention, dynamic=False) if compiled else ops.blocked_attention
    inputs = [torch.randn(1, heads, 512, 32).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(*inputs)
    probabilities = 4 * 512 * 512 * 5 // 8 * 2  # blocks of 128, 256, 384 and 512 keys
    of_inputs_and_output = 2 * (4 + 2 + 2 + 4) * 512 * 32
    assert probabilities <= sum(kept.values()) <= probabilities + of_inputs_and_output


def test_compiled_blocks_give_the_loss_and_gradients_of_plain_torch():
    config = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 512, (2, 161), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        model = Llama(config)
        model.initialize(1)
        if compiled:
            kernels, choices = choose({}, Setting(torch.device("cpu"), compiled=True))
            assert {c.operation: c.kernel for c in choices}["attention"] == "blocked"
            model.use(kernels)
            model.compile_blocks()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def test_the_recipe_knows_every_kernel_by_name():
    assert {operation: set(names) for operation, names in KERNELS.items()} == {o: set(k) for o, k in TABLE.items()}


@pytest.mark.parametrize(
    ("compiled", "documents", "attention"),
    [(False, False, "sdpa"), (True, False, "blocked"), (True, True, "sdpa")],
)
def test_on_a_cpu_the_choice_follows_the_compiler_and_the_masks(compiled, documents, attention):
    _, choices = choose({}, Setting(torch.device("cpu"), compiled, documents))
    assert {c.operation: c.kernel for c in choices} == {
        "attention": attention, "norm": "torch", "rotary": "torch", "swiglu": "torch", "loss": "chunked",
    }  # fmt: skip
    assert all(c.why for c in choices)


@pytest.mark.parametrize("operation", list(TABLE))
def test_a_kernel_that_cannot_be_used_is_an_error_and_not_another_one(operation):
    name = next(iter(TABLE[operation]))
    with pytest.raises(ConfigError, match=rf"training.kernels.{operation}='{name}': it needs a GPU; here: "):
        choose({operation: name}, Setting(torch.device("cpu")))


def test_a_masked_run_cannot_have_an_attention_without_masks():
    with pytest.raises(ConfigError, match=r"data\.document_masking needs a mask; here: sdpa"):
        choose({"attention": "blocked"}, Setting(torch.device("cpu"), documents=True))
