"""`tinyllama plan`: its form, its speed, what it reads and writes, and what it says to mistakes."""

from __future__ import annotations

import json
import resource
import sys

import pytest
from conftest import ROOT, tinyllama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama.cli.app import main
from tinyllama.planner import learning_rate
from train.recipe import load_recipe

FORM = ("params", "tokens", "epochs", "train_flops", "inference_flops", "total_flops", "saved_frac")
RUN = {"num_parameters": 1_000, "flops_per_token": 12_000}
BENCH = {
    "model": {"name": "tiny", "num_parameters": 1_000_000},
    "device": {"name": "NVIDIA H100 80GB HBM3"},
    "throughput": [
        {"batch_size": 1, "input_tokens": 96, "output_tokens": 32, "total_tokens_per_s": {"mean": 200.0}},
        {"batch_size": 8, "input_tokens": 96, "output_tokens": 32, "total_tokens_per_s": {"mean": 1000.0}},
    ],
}


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs the command in this process, which saves its start: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tinyllama", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def planned(plan):
    """The JSON of a plan that works."""

    def run(*arguments: object) -> dict:
        code, out, err = plan(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.alone
def test_answers_in_under_half_a_second():
    """Seconds of the processor, which are those of the clock where nothing else runs."""
    arguments = (
        "plan --fit besiroglu --loss-of 1.1e9 --inference-tokens 2e12 --unique-tokens 5e10 --max-epochs 4 --json"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = tinyllama(*arguments.split())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5, times
    found = json.loads(done.stdout)
    assert found["params"] == pytest.approx(3.4544e8, rel=1e-4)
    assert found["tokens"] == pytest.approx(2e11)
    assert found["epochs"] == pytest.approx(4)


def test_form_and_vectors(planned):
    found = planned("--fit", "besiroglu", "--loss-of", "1.1e9", "--inference-tokens", "2e12")
    shown = ["3.14894e+08", "2.54356e+11", "1.00000e+00", "4.80571e+20", "1.25958e+21", "1.74015e+21", "6.18695e-01"]
    assert [f"{found[key]:.5e}" for key in FORM] == shown
    assert found["disagreement"] is None
    limited = planned(
        "--fit", "besiroglu", "--loss-of", "1.1e9", "--inference-tokens", "2e12", "--unique-tokens", "1e11"
    )
    assert (
        f"{limited['params']:.5e} {limited['epochs']:.3f} {limited['total_flops']:.5e}"
        == "3.21319e+08 2.432 1.75407e+21"
    )


def test_all_fits_and_their_disagreement(planned):
    found = planned("--loss-of", "1.1e9", "--inference-tokens", "2e12")
    assert set(found["fits"]) == {
        "besiroglu", "hoffmann_sardana", "hoffmann_unrounded", "muennighoff", "hoffmann_rounded",
    }  # fmt: skip
    assert found["params"] == found["fits"]["besiroglu"]["params"]
    tokens = [entry["tokens"] for name, entry in found["fits"].items() if name != "hoffmann_rounded"]
    assert found["disagreement"]["tokens_frac"] == pytest.approx(max(tokens) / min(tokens) - 1)
    assert any("The fits disagree" in caveat for caveat in found["caveats"])
    assert any("extreme ones" in caveat for caveat in found["caveats"])


def test_the_demand_decides(planned):
    """Without demand the compute-optimal model is best and nothing is saved; far beyond any test, a warning."""
    found = planned("--loss-of", "1.1e9")
    assert found["params"] == pytest.approx(1.1e9)
    assert (found["saved_frac"], found["break_even_demand"], found["inference_flops"]) == (0, None, 0)
    extreme = planned("--loss-of", "1.1e9", "--inference-tokens", "1e16")
    assert any("beyond the 10,000" in warning for warning in extreme["warnings"])


def test_explain_tells_tinyllamas_story(planned, plan):
    found = planned("--explain", "1.1e9", "3e12")
    story = found["fits"]["besiroglu"]
    assert f"{story['loss']:.4f} {story['train_flops_ratio']:.1f}" == "2.2191 6.7"
    assert f"{story['same_loss']['params']:.2e} {story['same_loss']['tokens']:.3e}" == "4.85e+09 1.016e+11"
    assert f"{story['break_even_demand']:.2e} {story['optimal_at_demand']:.1e}" == "2.25e+12 4.3e+13"
    assert f"{story['optimal_tokens_for_params']:.3g}" == "2.48e+10"
    assert found["tokens_per_param"] == pytest.approx(3e12 / 1.1e9)
    # The same FLOPs, spent on the compute-optimal model, would reach a lower loss.
    assert story["same_flops"]["loss"] < story["loss"]
    repeated = planned("--explain", "1.1e9", "3e12", "--unique-tokens", "0.95e12", "--fit", "muennighoff")
    assert f"{repeated['effective_tokens']:.6e}" == "2.862750e+12"
    assert f"{repeated['fits']['muennighoff']['loss']:.6f}" == "2.266742"
    assert "6.7x" in plan("--explain", "1.1e9", "3e12")[1]


def test_the_plan_for_the_demand_explained_is_the_model_explained(planned):
    for minimised in ("flops", "dollars"):
        common = ("--fit", "muennighoff", "--minimise", minimised)
        told = planned("--explain", "1e9", "1e12", *common)["fits"]["muennighoff"]
        demand, loss = told["optimal_at_demand"], told["loss"]
        found = planned("--loss", repr(loss), "--inference-tokens", repr(demand), *common)
        assert (found["params"], found["tokens"]) == pytest.approx((1e9, 1e12), rel=1e-4)


def test_budgets_and_deadlines(planned):
    hours = planned("--gpu-hours", "1000", "--inference-tokens", "1e12")
    assert hours["train_gpu_hours"] == pytest.approx(1000)
    deadline = planned("--deadline-days", "30", "--gpus", "64", "--inference-tokens", "1e12")
    assert deadline["train_gpu_hours"] == pytest.approx(30 * 24 * 64)
    assert deadline["train_days"] == pytest.approx(30)
    bought = planned("--dollars", "50000", "--lifetime", "--inference-tokens", "1e12")
    assert bought["total_dollars"] == pytest.approx(50000)
    assert planned("--loss-of", "1.1e9", "--deadline-days", "1")["gpus"] == 5  # 115 hours


def test_recipe_of_the_proposed_shape_is_one_that_train_takes(planned, plan, tmp_path):
    written = tmp_path / "[a]recipe.json"
    arguments = ("--loss-of", "1.1e9", "--inference-tokens", "2e12", "--unique-tokens", "1e11", "--max-epochs", "3")
    found = planned(*arguments, "--write-recipe", written)
    recipe = load_recipe(written)
    assert recipe.model.num_parameters == found["architecture"]["num_parameters"]
    assert recipe.model.num_parameters == pytest.approx(found["params"], rel=0.05)
    assert recipe.training.tokens == round(found["tokens"])
    assert recipe.data.max_epochs == 3
    assert recipe.training.tokens / recipe.training.batch_tokens >= 5000
    assert found["architecture"]["loss"] == pytest.approx(found["loss"], abs=0.01)
    code, _, err = plan(*arguments, "--write-recipe", written)
    assert code == 2
    assert "exists" in err
    dry = tinyllama("train", "--recipe", written, "--dry-run", "--num-accelerators", "8")
    assert f"{recipe.model.num_parameters:,}" in dry.stdout


@pytest.mark.parametrize(("params", "lr"), [(1_100_048_384, 4e-4), (315e6, 6.07e-4), (7e9, 2.16e-4), (120e6, 8.37e-4)])
def test_the_learning_rate_follows_the_size(params, lr):
    assert learning_rate.learning_rate(params) == lr


def test_other_rules_have_their_published_values():
    """At 1.1B and 1e11 tokens, worked out by hand from the papers' formulas."""
    expected = {
        "Porian et al. 2024": 2.1682e-3,
        "Step Law*": 1.5252e-3,
        "DeepSeek*": 7.788e-4,
        "Bjorck et al.*": 3.474e-4,
    }
    found = learning_rate.other_rules(1.1e9, 1e11)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert found["OLMo-core's ladder"] == found["Porian et al. 2024"] / 2


def test_a_recipe_of_another_size_has_the_rate_of_that_size_and_says_why(planned, tmp_path):
    written = tmp_path / "recipe.json"
    found = planned("--loss-of", "3.15e8", "--write-recipe", written)
    recipe, rate = load_recipe(written), found["architecture"]["learning_rate"]
    assert recipe.model.num_parameters < 5e8
    assert recipe.optimizer.lr == rate["lr"] == learning_rate.learning_rate(recipe.model.num_parameters)
    assert recipe.optimizer.lr > 5e-4
    assert recipe.optimizer.min_lr == pytest.approx(recipe.optimizer.lr / 10)
    assert recipe.note == rate["text"]
    assert "Porian et al. 2024" in recipe.note
    assert recipe.optimizer.warmup_steps is None
    assert recipe.warmup_steps <= recipe.num_steps / 10


def test_measured_numbers_take_the_place_of_assumptions(planned, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    steps = [{"step": n, "mfu": mfu} for n, mfu in enumerate((0.01, 0.02, 0.6, 0.7, 0.5))]
    lines = [json.dumps(step) for step in (*steps, {"step": 4, "validation": {}}, {"step": 5, "mfu": None})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "mf')
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "prices.json").write_text('{"H100": 2.0}')
    found = planned("--loss-of", "1.1e9", "--inference-tokens", "1e12", "--run", tmp_path, "--bench", tmp_path,
                    "--prices", tmp_path / "prices.json")  # fmt: skip
    # The median of 0.6, 0.7 and 0.5, of 12,000 FLOPs a token where 6 N says 6,000.
    assert found["assumptions"]["train_mfu"] == pytest.approx(0.3)
    assert found["train_gpu_hours"] == pytest.approx(found["train_flops"] / (989e12 * 0.3 * 3600))
    assert found["serving_tokens_per_s"] == pytest.approx(1000 * 1e6 / found["params"])
    assert found["assumptions"]["output_frac"] == 0.25
    assert found["train_dollars"] == pytest.approx(2 * found["train_gpu_hours"])
    assert not any("priced as" in caveat for caveat in found["caveats"])
    other = planned("--loss-of", "1e9", "--bench", tmp_path / "bench.json", "--inference-device", "b200")
    assert any("priced as B200" in caveat for caveat in other["caveats"])
    sampled = [{**point, "samples_per_prompt": 3} for point in BENCH["throughput"]]
    (tmp_path / "bench.json").write_text(json.dumps({**BENCH, "throughput": sampled}))
    other = planned("--loss-of", "1e9", "--inference-tokens", "1e12", "--bench", tmp_path)
    assert other["assumptions"]["output_frac"] == 0.5


def test_published_gpu_hours(planned):
    runs = planned("--published")["runs"]
    assert [round(run["gpu_hours"]) for run in runs] == [3456, 4830, 7920]


def test_the_documentation_shows_what_the_command_prints(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    text = (ROOT / "docs" / "planning.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("    $ tinyllama plan ")]
    assert len(commands) >= 5
    for command in commands:
        _, out, err = plan(*command.split()[3:])
        printed = [f"    {line}".rstrip() for line in (out + err).rstrip().splitlines()]
        assert "\n".join([command, *printed, ""]) in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "no goal is given"),
        ("--loss 1.5", "a loss of 1.5 is not above 1.8169"),
        ("--loss 2 --loss-of 1e9", "--loss and --loss-of contradict each other"),
        ("--loss-of 1.1e9 --unique-tokens 1e9", "cannot be reached from --unique-tokens 1e+09 in --max-epochs 4"),
        ("--loss-of nan", "--loss-of nan"),
        ("--loss-of -1", "give a number from 10000 to"),
        ("--loss-of 1e9 --inference-tokens -5", "--inference-tokens -5"),
        ("--loss-of 1e9 --max-epochs 4", "--max-epochs 4 of what?"),
        ("--loss-of 1e9 --unique-tokens 1e12 --max-epochs 0", "--max-epochs 0"),
        ("--loss-of 1e4 --inference-tokens 1e15", "fewer than 10,000 parameters"),
        ("--train-flops 1e9", "out of the range"),
        ("--dollars inf", "--dollars inf"),
        ("--loss-of 1e9 --lifetime", "--lifetime says what a budget pays for"),
        ("--deadline-days 3 --gpus 8 --lifetime", "--lifetime says what a budget pays for"),
        ("--deadline-days 3", "no goal is given"),
        ("--loss-of 1e10 --deadline-days 1 --gpus 8", "give at least --gpus"),
        ("--loss-of 1e9 --fit besirogl", "did you mean besiroglu?"),
        ("--loss-of 1e9 --device H10", "did you mean H100?"),
        ("--loss-of 1e9 --mfu 1.5", "--mfu 1.5"),
        ("--loss-of 1e9 --mfu 0.5 --run x", "--mfu and --run contradict each other"),
        ("--loss-of 1e9 --output-frac 0.5 --bench x", "--output-frac and --bench contradict each other"),
        ("--loss-of 1e9 --minimise time", "give flops or dollars"),
        ("--loss-of 1e9 --run missing", "missing"),
        ("--loss-of 1e9 --bench missing", "missing"),
        ("--loss-of 1e9 --prices missing", "missing"),
        ("--loss-of 1e9 --write-recipe missing/recipe.json", "give a file in a folder that exists"),
        ("--explain 1e9 1e12 --write-recipe recipe.json", "--write-recipe with --explain"),
        ("--explain 0 1e12", "--explain N 0"),
        ("--loss-of 1e7 --write-recipe recipe.json --vocab-size 9000000", "no Llama with a vocabulary of 9,000,000"),
    ],
)
def test_mistakes_are_one_line(plan, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*arguments.split())
    assert code == 2
    assert not out
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("prices", "{", "is not JSON"),
        ("prices", "[]", "is not a JSON object"),
        ("prices", '{"H100": -1}', "H100.dollars_per_hour=-1 is not a positive number"),
        ("prices", '{"H100": {"dollar_per_hour": 1}}', "did you mean dollars_per_hour?"),
        ("prices", '{"New": 1}', "New has no peak_flops"),
        ("bench", "{}", "holds no throughput"),
        ("bench", '{"throughput": []}', "holds no throughput"),
        (
            "bench",
            json.dumps({**BENCH, "model": {"name": "x", "num_parameters": None}}),
            "does not know its model's size",
        ),
        ("run", "", "metrics.jsonl"),
    ],
)
def test_damaged_files(plan, tmp_path, name, text, said):
    file = tmp_path / f"{name}.json"
    file.write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    code, _, err = plan("--loss-of", "1e9", f"--{name}", tmp_path if name == "run" else file)
    assert code == 2
    assert said in err


def test_run_without_mfu(plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mfu": null}\n[]\n')
    code, _, err = plan("--loss-of", "1e9", "--run", tmp_path)
    assert code == 2
    assert "has logged no MFU" in err


NUMBERS = st.one_of(st.floats(), *3 * [st.floats(-2, 33).map(lambda e: 10**e)])
GOALS = st.sampled_from(["--loss", "--loss-of", "--train-flops", "--gpu-hours", "--dollars", "--explain"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    goal=GOALS,
    numbers=st.tuples(NUMBERS, NUMBERS),
    options=st.dictionaries(
        st.sampled_from(
            ["--inference-tokens", "--unique-tokens", "--max-epochs", "--mfu", "--output-frac", "--deadline-days"]
        ),
        NUMBERS,
        max_size=4,
    ),
    minimised=st.sampled_from(["flops", "dollars"]),
)
def test_any_numbers_give_a_plan_or_one_line(plan, goal, numbers, options, minimised):
    given_options = [word for name, value in options.items() for word in (f"{name}={value!r}",)]
    values = [repr(value) for value in (numbers if goal == "--explain" else numbers[:1])]
    code, out, err = plan(goal, *values, *given_options, "--minimise", minimised, "--json")
    assert code in (0, 2)
    if code == 0:
        found = json.loads(out)
        assert all(value is None or value == value for value in found.values())
    else:
        assert err.startswith(("error: ", "Usage: "))
