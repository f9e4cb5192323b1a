"""Fused projections: outside of the model there are Hugging Face's names, and every value lies where it lay before."""

from __future__ import annotations

import copy
import hashlib
import pickle
from math import prod

import pytest
import torch
import torch.nn.functional as F
import transformers

from tinyllama.model import fused
from tinyllama.model.config import ModelConfig
from tinyllama.model.hf import shapes
from tinyllama.model.llama import Llama
from tinyllama.model.quantized import round_inputs, round_int8

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
# Of `initialize(7)` when each projection was a parameter of its own.
SEED_7 = "c2fc2fb58686510b015059eb62e207c394024146b03a77cda6c4fe312406e39b"


@pytest.fixture
def model() -> Llama:
    built = Llama(CONFIG)
    built.initialize(7)
    return built


def test_names_and_values_are_those_of_separate_projections(model):
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).state_dict()
    ours = model.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert list(ours) == list(shapes(CONFIG))
    digest = hashlib.sha256()
    for name, tensor in ours.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == SEED_7
    numbers = sum(map(prod, shapes(CONFIG).values())), sum(p.numel() for p in model.parameters())
    assert numbers == (CONFIG.num_parameters, CONFIG.num_parameters)


def test_a_state_dict_shares_the_weights_and_loads_into_another_model(model):
    model.state_dict()["model.layers.1.mlp.up_proj.weight"][3, 5] = 42
    assert (model.model.layers[1].mlp.gate_up_proj.weight == 42).nonzero().tolist() == [[176 + 3, 5]]
    again = Llama(CONFIG)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.device("meta"):
        empty = Llama(CONFIG)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), empty.parameters(), strict=True))


def test_a_model_can_be_copied_and_pickled(model):
    ids = torch.randint(0, CONFIG.vocab_size, (2, 16))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), model(ids))
        assert list(other.state_dict()) == list(model.state_dict())


def test_state_dicts_that_do_not_fit_are_refused_by_hugging_faces_names(model):
    key, value = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    before = model.state_dict()[key].clone()
    with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
        model.load_state_dict({name: tensor for name, tensor in given.items() if name != key})
    found = model.load_state_dict({name: t for name, t in given.items() if name != key}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([key], [])
    assert torch.equal(model.state_dict()[key], before)
    assert torch.equal(model.state_dict()[value], given[value])
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}: \(17, 64\), expected \(16, 64\)"):
        model.load_state_dict({**given, key: torch.zeros(17, 64)})


def test_slices_of_a_fused_parameter_are_slices_of_its_parts_however_it_is_cut(model):
    whole = dict(fused.hf_parameters(model))
    for ranks in (1, 2, 3, 7, 64):
        seen = dict.fromkeys(whole, 0)
        for name, parameter in model.named_parameters():
            flat, share = parameter.detach().flatten(), -(-parameter.numel() // ranks)
            for rank in range(ranks):
                position, end = min(flat.numel(), rank * share), min(flat.numel(), (rank + 1) * share)
                for part, start, stop in fused.split_slice(name, position, end, CONFIG):
                    assert torch.equal(whole[part].flatten()[start:stop], flat[position : position + stop - start])
                    assert start == seen[part]  # in order, nothing twice
                    seen[part] = stop
                    position += stop - start
                assert position == end
        assert seen == {name: tensor.numel() for name, tensor in whole.items()}


def test_parts_join_in_any_order(model):
    ours = dict(model.named_parameters())
    joined = dict(fused.join(reversed(list(fused.hf_parameters(model))), CONFIG))
    assert joined.keys() == ours.keys()
    assert all(torch.equal(joined[name], parameter) for name, parameter in ours.items())


@torch.no_grad()
@pytest.mark.parametrize("rounded", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"), ("k_proj",), ()])
def test_inputs_are_rounded_for_the_quantized_parts_alone(model, rounded):
    weights = model.state_dict()
    stem = "model.layers.0.self_attn."
    round_inputs(model, "int8", {stem + part for part in rounded})
    x = torch.randn(1, 5, 64)
    expected = [
        F.linear(round_int8(x) if part in rounded else x, weights[f"{stem}{part}.weight"])
        for part in ("q_proj", "k_proj", "v_proj")
    ]
    torch.testing.assert_close(model.model.layers[0].self_attn.qkv_proj(x), torch.cat(expected, -1))
    assert not torch.allclose(round_int8(x), x, atol=1e-4)


def test_values_do_not_keep_queries_and_keys_in_memory(model):
    """What a block keeps of its one product until the backward pass is its values, and not all of it."""
    kept: list[torch.Tensor] = []
    x = torch.randn(1, 16, 64, requires_grad=True)
    cos, sin = torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.model.layers[0].self_attn(x, cos, sin)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert 4 * 16 * (64 + 2 * 16) not in sizes.values()
    assert 4 * 16 * 16 in sizes.values()
