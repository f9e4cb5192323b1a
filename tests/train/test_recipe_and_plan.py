"""Recipes, schedule and batch plan: exact numbers, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from tinyllama.errors import ConfigError, UserError
from train.plan import open_mixture, plan_batch, read_deepspeed, resolve_deepspeed
from train.recipe import RECIPES, Recipe, load_recipe
from train.schedule import learning_rate

CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_survives_json(path):
    recipe = load_recipe(path)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_default_recipe_is_tinyllamas():
    recipe = load_recipe()
    model = recipe.model
    assert model.num_parameters == 1_100_048_384
    shape = (model.num_hidden_layers, model.num_attention_heads, model.num_key_value_heads, model.hidden_size)
    assert shape == (22, 32, 4, 2048)
    assert (model.intermediate_size, model.vocab_size, recipe.data.sequence_length) == (5632, 32000, 2048)
    assert [(s.name, s.weight) for s in recipe.data.sources] == [("slimpajama", 0.7), ("starcoder", 0.3)]
    assert (recipe.training.tokens, recipe.training.batch_tokens) == (3 * 10**12, 2 * 1024 * 1024)
    opt = recipe.optimizer
    assert (opt.lr, opt.min_lr, recipe.warmup_steps, opt.betas) == (4e-4, 4e-5, 2000, (0.9, 0.95))
    assert (opt.weight_decay, opt.grad_clip) == (0.1, 1.0)


def test_golden_schedule():
    """TinyLlama trained 500B tokens with min_lr equal to lr; this is what it should have been."""
    recipe = load_recipe()
    batch = recipe.training.batch_tokens
    assert learning_rate(0, recipe) == pytest.approx(4e-4 / 2000)
    assert learning_rate(999 * batch, recipe) == pytest.approx(2e-4)
    assert learning_rate(1999 * batch, recipe) == 4e-4
    assert learning_rate(2000 * batch, recipe) == 4e-4
    middle = (2000 * batch + recipe.training.tokens) // 2
    assert learning_rate(middle, recipe) == pytest.approx(2.2e-4, rel=1e-9)
    quarter = 2000 * batch + (recipe.training.tokens - 2000 * batch) // 4
    assert learning_rate(quarter, recipe) == pytest.approx(4e-5 + 1.8e-4 * (1 + math.cos(math.pi / 4)), rel=1e-9)
    assert learning_rate(recipe.training.tokens, recipe) == 4e-5
    assert learning_rate(2 * recipe.training.tokens, recipe) == 4e-5


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_golden_warmup_stable_decay(shape, half):
    batch, steps = 1000, 1000
    recipe = load_recipe(
        settings=[
            *(f"training.tokens={batch * steps}", f"training.batch_tokens={batch}", "optimizer.warmup_steps=100"),
            *("optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "optimizer.schedule=wsd", "optimizer.decay_frac=0.2"),
            f"optimizer.decay_shape={shape}",
        ]
    )
    rates = [learning_rate(step * batch, recipe) for step in range(steps + 2)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[49] == pytest.approx(5e-4)
    assert set(rates[99:801]) == {1e-3}  # the whole of the stable part, and the first step of the decay
    assert rates[900] == pytest.approx(1e-4 + 9e-4 * half)
    assert all(before > after for before, after in itertools.pairwise(rates[800:1001]))
    assert rates[1000] == rates[1001] == 1e-4


def test_a_stable_part_does_not_depend_on_how_long_the_run_will_be():
    """So that a run can go on from any checkpoint of it, with more tokens or towards an earlier end."""
    common = ["training.batch_tokens=1000", "optimizer.warmup_steps=10", "optimizer.schedule=wsd"]
    short = load_recipe(settings=[*common, "data.sequence_length=1000", "training.tokens=1e6"])
    long = load_recipe(settings=[*common, "data.sequence_length=1000", "training.tokens=5e6"])
    rates = [[learning_rate(tokens, recipe) for tokens in range(0, 800_000, 1000)] for recipe in (short, long)]
    assert rates[0] == rates[1]


def test_batch_is_the_same_tokens_for_every_number_of_ranks():
    recipe = load_recipe()
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128):
        plan = plan_batch(recipe, ranks)
        assert plan.tokens == recipe.training.batch_tokens
        covered = [s for r in range(ranks) for m in range(plan.accumulation) for s in plan.samples(3, r, m)]
        assert sorted(covered) == list(range(3 * 1024, 4 * 1024))


def test_impossible_batches_name_all_numbers_and_the_nearest():
    recipe = load_recipe(settings=["training.batch_tokens=500000"])
    with pytest.raises(
        ConfigError, match=r"500,000 is not a multiple of micro 4 x seq 2048 x ranks 8 = 65,536.*524,288"
    ):
        plan_batch(recipe, 8, 4)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.min_lr=4e-4", "min_lr=0.0004 is not below"),
        ("optimizer.schedule=wds", "did you mean wsd"),
        ("optimizer.decay_shape=sqrt", "did you mean 1-sqrt"),
        ("optimizer.decay_frac=0", "decay_frac=0.0; give a finite number above 0"),
        ("training.compile=blocks", "did you mean block"),
        ("training.compile=true", "training.compile=True is not of type str or null"),
        ("training.kernels.attention=flash-atn-3", "did you mean flash-attn-3"),
        ("training.kernels.softmax=liger", "training.kernels.softmax is not a recipe setting"),
        ("optimiser.lr=1", "did you mean optimizer"),
        ("optimizer.beta=1", "did you mean betas"),
        ("training.tokens=many", "training.tokens='many' is not of type int"),
        ("training.tokens=1.5", "training.tokens=1.5 is not of type int"),
        ("data.sequence_length=4096", "max_position_embeddings=2048"),
        ("checkpoint.keep_last=0", "keep_last=0"),
        ("model.num_key_value_heads=5", "num_key_value_heads=5"),
        ("nonsense", "--set nonsense"),
    ],
)
def test_wrong_settings_are_one_clear_line(setting, words):
    with pytest.raises(UserError, match=words):
        load_recipe(settings=[setting])


def test_settings_lie_over_the_recipe():
    recipe = load_recipe("tinyllama_120m", ["training.tokens=1e9", "training.micro_batch_sequences=4"])
    assert (recipe.training.tokens, recipe.training.micro_batch_sequences) == (10**9, 4)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_deepspeed_json_resolves(path):
    raw = read_deepspeed(path)
    for ranks in (1, 8, 64):
        resolved, plan = resolve_deepspeed(raw, load_recipe(), ranks)
        assert "auto" not in json.dumps(resolved)
        product = resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * ranks
        assert resolved["train_batch_size"] == product == plan.sequences == 1024
        assert resolved["gradient_clipping"] == 1.0
        assert resolved["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5"),
        ({"train_batch_size": 7}, "train_batch_size=7"),
        ({"zero_optimization": {"stage": 0}}, "stage=0"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow=false"),
    ],
)
def test_contradictions_between_json_and_recipe_are_refused(tmp_path, change, words):
    config = {**json.loads((CONFIGS / "zero3.json").read_text()), **change}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        resolve_deepspeed(read_deepspeed(tmp_path / "ds.json"), load_recipe(), 8)


def test_too_many_epochs_are_refused_before_launch(stores):
    recipe = load_recipe("demo", ["model.vocab_size=600", "training.tokens=1e9"])
    with pytest.raises(UserError, match=r"would be repeated .*Muennighoff"):
        open_mixture(recipe, stores)


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(UserError, match="tinyllama data prepare"):
        open_mixture(load_recipe("demo"), tmp_path)


def test_other_vocabulary_is_refused(stores):
    recipe = load_recipe("demo")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, tokens=8192))
    with pytest.raises(ConfigError, match=r"600 pieces, model\.vocab_size=4096"):
        open_mixture(recipe, stores)


def test_misspelt_deepspeed_settings_are_refused(tmp_path):
    """DeepSpeed itself says nothing of an unknown section, and the run goes on without what was meant."""
    config = {**json.loads((CONFIGS / "zero3.json").read_text()), "gradient_cliping": 1.0}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"'gradient_cliping' is not a setting.*did you mean gradient_clipping"):
        read_deepspeed(tmp_path / "ds.json")


def test_the_second_copy_of_the_weights_stays_inside_a_machine():
    raw = read_deepspeed(CONFIGS / "zero3_hierarchical.json")
    sizes = {
        (ranks, per_node): resolve_deepspeed(raw, load_recipe(), ranks, per_node)[0]["zero_optimization"]
        for ranks, per_node in ((64, 8), (8, 8), (16, None))
    }
    assert {key: zero["zero_hpz_partition_size"] for key, zero in sizes.items()} == {
        (64, 8): 8,
        (8, 8): 1,
        (16, None): 1,
    }
