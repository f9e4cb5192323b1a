"""Attention that stays inside packed documents: every kernel, compiled blocks, and the blocks that are left out."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.attention.flex_attention as torch_flex

from tinyllama.data.loader import document_layout
from tinyllama.model import flex, ops
from tinyllama.model.config import ModelConfig
from tinyllama.model.kernels import PLAIN, TABLE, Setting, choose
from tinyllama.model.llama import Llama

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 16, 300  # two whole blocks of 128 and a part of one
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def numbers() -> torch.Tensor:
    """(4, T): documents that cross blocks, documents of one token, a single document, and ends at a block's edge."""
    starts = torch.zeros(4, LENGTH, dtype=torch.long)
    starts[0, [100, 200]] = 1
    starts[1, 120:140] = 1
    starts[3, [1, 128, 256, 299]] = 1
    return starts.cumsum(1)


def given() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(4, LENGTH, heads, WIDTH, generator=generator).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def alone(q, k, v, documents):
    """Each document by itself, in plain arithmetic: (B, T, H * D)."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    rows = []
    for row in range(q.shape[0]):
        parts = []
        for number in documents[row].unique():
            at = documents[row] == number
            scores = q[row, :, at] @ k[row, :, at].transpose(1, 2) / math.sqrt(WIDTH)
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            parts.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ v[row, :, at])
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows).transpose(1, 2).flatten(2)


def passes(function, arguments, *more):
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    output = function(*leaves, *more)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    return [output.detach().float().cpu(), *(x.grad.float().cpu() for x in leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sdpa", "blocked", "flex"])
def test_documents_attend_as_if_each_was_alone(name, dtype, device):
    setting = Setting(torch.device(device), documents=True)
    if reason := TABLE["attention"][name].missing(setting):
        pytest.skip(f"{name}: {reason}")
    kernels, _ = choose({"attention": name}, setting)
    expected = passes(alone, given(), numbers())
    found = passes(kernels.attention, [x.to(device, dtype) for x in given()], kernels.layout(numbers().to(device)))
    for mine, reference in zip(found, expected, strict=True):
        error = ((mine - reference).norm() / reference.norm()).item()
        assert error < (2e-6 if dtype == torch.float32 else 1.5e-2)


def test_blocks_without_a_common_document_are_left_out():
    """The tables against those that torch makes from the whole mask."""
    mask = flex.block_mask(flex.layout(numbers()))
    expected = torch_flex.create_block_mask(mask.mask_mod, 4, None, LENGTH, LENGTH, device="cpu")
    assert torch.equal(mask.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        counts = getattr(mask, name.replace("indices", "num_blocks"))[..., None]
        used = torch.arange(3) < counts  # what comes after the count is not read
        assert torch.equal(getattr(mask, name) * used, getattr(expected, name) * used), name
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() < 4 * 6  # fewer than the causal half
    # The GPU's kernels take it for granted (torch/_inductor/kernel/flex/templates), and would read other blocks.
    assert all(table.is_contiguous() for table in flex.layout(numbers()))


def test_documents_whose_numbers_do_not_rise_lose_no_block():
    shuffled = numbers()[:, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))]
    mask = flex.block_mask(flex.layout(shuffled))
    dense = ops.document_mask(shuffled)
    padded = torch.nn.functional.pad(dense, (0, 84, 0, 84)).unflatten(3, (-1, 128)).unflatten(2, (-1, 128))
    some, every = padded.any(5).any(3), padded.all(5).all(3)
    assert (mask.to_dense().bool() | ~some).all()
    whole = torch.arange(3) < mask.full_kv_num_blocks[..., None]
    for row, block, place in whole[:, 0].nonzero():
        assert every[row, 0, block, mask.full_kv_indices[row, 0, block, place]]


def test_flex_gives_the_values_and_gradients_and_breaks_no_graph(monkeypatch):
    """What is compiled, up to the kernel: torch's own dense form of FlexAttention, whose refusal of a CPU is lifted."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex.attention, backend=counter, fullgraph=True, dynamic=False)
    for documents in (numbers(), numbers().flip(0)):
        expected = passes(alone, given(), documents)
        found = passes(compiled, given(), flex.layout(documents))
        for mine, reference in zip(found, expected, strict=True):
            assert ((mine - reference).norm() / reference.norm()).item() < 2e-6
    assert counter.frame_count == 1  # other documents are no reason to compile again


def test_compiled_blocks_with_documents_give_the_loss_and_gradients_of_plain_torch():
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(2, 64, (2, 101), generator=torch.Generator().manual_seed(0))
    ids[0, [0, 50, 51, 95]] = 1
    layout = dict(
        zip(("documents", "positions"), map(torch.from_numpy, document_layout(ids[:, :-1].numpy(), 1)), strict=True)
    )
    found, ran = [], []
    for compiled in (False, True):
        model = Llama(config)
        model.initialize(1)
        if compiled:
            kernels, choices = choose({}, Setting(torch.device("cpu"), compiled=True, documents=True))
            assert choices[0].kernel == "blocked"
            model.use(kernels)
            model.compile_blocks()
            for block in model.model.layers:
                inner = block.compiled
                block.compiled = lambda *a, inner=inner, **k: ran.append(inner) or inner(*a, **k)
        else:
            assert model.kernels is PLAIN
        loss = model(ids[:, :-1], ids[:, 1:], **layout)
        loss.backward()
        assert len(ran) == (2 if compiled else 0)
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # validation: not compiled, the same kernel
        torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:], **layout), found[0][0], rtol=1e-4, atol=1e-4)
