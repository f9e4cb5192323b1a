"""The arithmetic of the model's shape against published numbers."""

from __future__ import annotations

import pytest

from tinyllama.errors import ConfigError
from tinyllama.model.config import ModelConfig


def test_tinyllama_has_the_published_size():
    assert ModelConfig().num_parameters == 1_100_048_384
    assert ModelConfig().num_matmul_parameters == 1_034_420_224


@pytest.mark.parametrize(("convention", "gflop"), [("full", 7.314), ("all_parameters", 7.708), ("causal", 6.760)])
def test_flops_per_token_of_each_convention(convention, gflop):
    assert ModelConfig().flops_per_token(2048, convention) / 1e9 == pytest.approx(gflop, abs=5e-4)


def test_tinyllamas_own_mfu_is_reproduced():
    """24,000 tokens/s on an A100 (312 TFLOP/s) is the 56 % of TinyLlama's README."""
    assert 24_000 * ModelConfig().flops_per_token(2048) / 312e12 == pytest.approx(0.563, abs=5e-4)


def test_hugging_face_config_round_trip(tmp_path):
    import json

    config = ModelConfig(vocab_size=100, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, rope_theta=5e5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_sise": 4}, "did you mean hidden_size"),
        ({"num_attention_heads": 30}, "num_attention_heads=30"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_impossible_shapes_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict(values)


def test_architectures_that_are_not_ours_are_refused(tmp_path):
    import json

    for change in ({"model_type": "gpt2"}, {"attention_bias": True}, {"rope_scaling": {"rope_type": "linear"}}):
        (tmp_path / "config.json").write_text(json.dumps({**ModelConfig().to_hf(), **change}))
        with pytest.raises(ConfigError):
            ModelConfig.from_hf(tmp_path)
