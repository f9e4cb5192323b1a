"""Our Llama against transformers' LlamaForCausalLM, and against itself with a cache."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from tinyllama.errors import CheckpointError
from tinyllama.model import fused
from tinyllama.model.config import ModelConfig
from tinyllama.model.hf import load_model
from tinyllama.model.kernels import PLAIN
from tinyllama.model.llama import KVCache, Llama
from tinyllama.model.ops import chunked_loss
from train.recipe import RECIPES

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def theirs(config: ModelConfig, ours: Llama) -> transformers.LlamaForCausalLM:
    values = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type", "torch_dtype")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.load_state_dict(ours.state_dict(), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Llama:
    built = Llama(TINY)
    built.initialize(1)
    return built.eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (3, 100), generator=torch.Generator().manual_seed(0))


def shipped_shapes() -> list[ModelConfig]:
    """Every shipped recipe's attention shape and ratios, with fewer layers and a smaller vocabulary."""
    found = []
    for path in sorted(RECIPES.glob("*.json")):
        shape = json.loads(path.read_text())["model"]
        found.append(ModelConfig.from_dict({**shape, "num_hidden_layers": 1, "vocab_size": 1000}))
    return found


@pytest.mark.parametrize("config", shipped_shapes(), ids=lambda c: f"hidden{c.hidden_size}")
def test_logits_and_gradients_equal_transformers_for_every_shipped_shape(config):
    ours = Llama(config)
    ours.use(dataclasses.replace(PLAIN, loss=partial(chunked_loss, chunk_tokens=16)))
    ours.initialize(3)
    reference = theirs(config, ours)
    batch = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(batch), reference(batch).logits, rtol=1e-5, atol=1e-5)
    loss = ours(batch[:, :-1], batch[:, 1:])
    expected = reference(batch, labels=batch).loss * batch[:, 1:].numel()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    gradients = dict(reference.named_parameters())
    found = [part for name, p in ours.named_parameters() for part in fused.split(name, p.grad, config)]
    assert sorted(name for name, _ in found) == sorted(gradients)
    for name, gradient in found:
        torch.testing.assert_close(gradient, gradients[name].grad, rtol=1e-3, atol=2e-4, msg=name)


def test_a_cache_changes_nothing(model, ids):
    cache = KVCache(TINY, 3, 100, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        parts = [model(ids[:, :40], cache=cache)]
        parts += [model(ids[:, i : i + 1], cache=cache) for i in range(40, 60)]
        parts += [model(ids[:, 60:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing(ids):
    gradients = []
    for flag in (False, True):
        model = Llama(TINY)
        model.initialize(2)
        model.train()
        model.model.activation_checkpointing = flag
        model(ids, ids).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def kept_for_backward(model: Llama, ids: torch.Tensor) -> int:
    """Bytes that the blocks keep between forward and backward: distinct memory, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(ids)
        found.pop(hidden.untyped_storage().data_ptr(), None)
    return sum(found.values())


def test_activation_checkpointing_keeps_the_blocks_inputs_alone():
    config = dataclasses.replace(TINY, num_hidden_layers=8, vocab_size=64)
    model = Llama(config).bfloat16()
    model.train()
    batch = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(1))
    kept = {}
    for flag in (False, True):
        model.model.activation_checkpointing = flag
        kept[flag] = kept_for_backward(model, batch) / batch.numel()
    inputs = (
        2 * config.hidden_size * config.num_hidden_layers
    )  # what the dry run counts: bf16, one input for each block
    assert inputs <= kept[True] < 2.5 * inputs
    assert kept[False] > 6 * kept[True]


def test_initial_weights_have_the_stated_statistics():
    config = ModelConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8
    )
    model = Llama(config)
    model.initialize(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        std = 0.02 / (8**0.5) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(parameter.mean().item()) < 4 * std / parameter.numel() ** 0.5, name
        assert not (parameter == 0).any(), name
    again = Llama(config)
    again.initialize(5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_one_batch_overfits():
    model = Llama(TINY)
    model.initialize(1)
    batch = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(batch[:, :-1], batch[:, 1:]) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_hugging_face_directory_loads_and_wrong_ones_are_refused(model, ids, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    theirs(TINY, model).save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), model(ids), rtol=1e-5, atol=1e-5)
    weights = load_file(tmp_path / "model.safetensors")
    missing = {k: v for k, v in weights.items() if k != "model.norm.weight"}
    extra = {**weights, "extra": weights["model.norm.weight"].clone()}
    for wrong, words in ((missing, "model.norm.weight is missing"), (extra, "unexpected tensor extra")):
        save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="corrupt"):
        load_model(tmp_path)


def test_masked_documents_are_as_if_alone(model):
    """Packed into one row with their own positions, documents give the logits that each gives alone."""
    from tinyllama.data.loader import document_layout

    generator = torch.Generator().manual_seed(4)
    lengths, separator = (17, 1, 40, 42), 1
    parts = [torch.randint(2, TINY.vocab_size, (n,), generator=generator) for n in lengths]
    for part in parts[1:]:
        part[0] = separator  # the first document began before the row
    row = torch.cat(parts)[None]
    documents, positions = (torch.from_numpy(a) for a in document_layout(row.numpy(), separator))
    with torch.no_grad():
        packed = model(row, documents=documents, positions=positions)
        plain = model(row)
        start = 0
        for part in parts:
            alone = model(part[None])
            torch.testing.assert_close(packed[:, start : start + len(part)], alone, rtol=1e-4, atol=1e-5)
            if start:
                assert not torch.allclose(plain[:, start : start + len(part)], alone, atol=1e-3)
            start += len(part)
