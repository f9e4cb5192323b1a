"""config.json changed in every way: our loader refuses it in one line, or computes transformers' logits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_stored import SHAPE, hugging_face
from transformers import AutoModelForCausalLM

from tinyllama.errors import UserError
from tinyllama.model.config import FIELDS, ModelConfig
from tinyllama.model.hf import load_model

IDS = torch.arange(24).reshape(2, 12) % SHAPE["vocab_size"]
ODD = [
    None, True, 0, -1, 2, 4, 16, 0.5, 1.0, 10**30, float("nan"), float("inf"), "", "16", [], [1], {}, {"rope_theta": 5e5},
    {"rope_type": "default", "rope_theta": 3.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"type": "dynamic", "factor": 2.0}, {"rope_theta": "x"}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 7.0}},
]  # fmt: skip
UNKNOWN = ("rope_interleaved", "logit_scale")  # of which transformers takes no notice


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("mutated") / "model")


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def agrees(directory: Path, content: str) -> bool:
    """Whether our loader takes this config.json; fails unless it then computes what transformers does."""
    (directory / "config.json").write_text(content)
    error = None
    try:
        ours = load_model(directory)
    except UserError as refused:
        error = str(refused)
    if error is not None:
        assert "\n" not in error
        assert str(directory) in error
        return False
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5, msg=content)
    return True


def test_every_field_with_every_odd_value(model: Path):
    original = json.loads((model / "config.json").read_text())
    assert agrees(model, json.dumps(original))
    accepted = 0
    for name in (*FIELDS, *UNKNOWN, "architectures", "model_type", "quantization_config"):
        for value in ODD if name not in UNKNOWN else ODD[::6]:
            accepted += agrees(model, json.dumps({**original, name: value}))
        accepted += agrees(model, json.dumps({k: v for k, v in original.items() if k != name}))
    assert accepted > 60  # those that say nothing of the logits, and those that are the default


def test_two_changes_at_once(model: Path):
    original = json.loads((model / "config.json").read_text())
    drawn = random.Random(3)
    names = [*FIELDS, "rope_theta", "rope_parameters", "rope_scaling", "rope_parameters", "rope_theta"]
    for _ in range(100):
        changed = dict(original)
        for name in drawn.sample(names, 2):
            changed[name] = drawn.choice(ODD)
        agrees(model, json.dumps(changed))


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 5e5, "rope_parameters": None}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": None}, 5e5),
        ({"rope_parameters": {}}, 1e4),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default"}}, 5e5),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "default"},
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            5e5,
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            None,
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5}, "rope_parameters": None}, None),
        ({"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 1e4}}, None),
    ],
)
def test_the_base_of_rope_stands_there_once(model: Path, fields: dict[str, Any], theta: float | None):
    content = {**SHAPE, "model_type": "llama", **fields}
    (model / "config.json").write_text(json.dumps(content))
    if theta is None:
        with pytest.raises(UserError, match="which one"):
            ModelConfig.from_hf(model)
        return
    assert ModelConfig.from_hf(model).rope_theta == theta
    assert agrees(model, json.dumps(content))


def test_a_key_that_stands_there_twice(model: Path):
    assert not agrees(model, '{"model_type": "llama", "hidden_size": 16, "hidden_size": 32}')
