"""Real DeepSpeed ZeRO-3 runs: what is logged, resumed, refused and exported."""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, members, settings, tinyllama, train, until

from tinyllama import checkpoint
from tinyllama.data.loader import HeldOut, Mixture, Source
from tinyllama.errors import CheckpointError
from tinyllama.model.fused import hf_parameters
from tinyllama.model.llama import Llama
from train.batch import model_inputs
from train.distributed import extensions_folder
from train.launch import free_port, ranks_below
from train.recipe import Recipe
from train.schedule import learning_rate
from train.text_bytes import TextBytes


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run) if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read_weights(folder))


def recipe_of(run: Path) -> Recipe:
    return Recipe.from_dict(json.loads((run / "config.json").read_text())["recipe"])


def mixture_of(run: Path, stores: Path) -> Mixture:
    recipe = recipe_of(run)
    sources = [Source(s.name, stores / s.name, s.weight) for s in recipe.data.sources]
    return Mixture(sources, recipe.data.sequence_length, recipe.data.seed)


def test_run_directory_has_what_is_promised(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["batch"] == {"micro": 6, "accumulation": 1, "ranks": 2, "reduce_once": False}
    assert config["deepspeed"]["zero_optimization"]["stage"] == 3
    assert config["device"]
    first = metrics(finished_run)[0]
    assert (first["step"], first["tokens"]) == (0, 0)
    assert first["started"]["ranks"] == 2
    assert datetime.datetime.fromisoformat(first["started"]["at"]).tzinfo is not None
    steps = [entry for entry in metrics(finished_run) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 10))
    recipe = recipe_of(finished_run)
    for entry in steps:
        assert entry["tokens"] == entry["step"] * 768
        assert entry["lr"] == learning_rate(entry["tokens"] - 768, recipe)
        assert entry["step_time_s"] * entry["tokens_per_s"] == pytest.approx(768)
        assert entry["grad_norm"] > 0
        assert 0 < entry["mfu"] < 1
        assert entry["skipped_steps"] == 0
    assert [step for step, _ in checkpoint.list_checkpoints(finished_run)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("stage", "masked", "once", "compiled"),
    [
        pytest.param(3, False, False, "null", id="zero3"),
        pytest.param(3, True, True, "null", id="zero3-masked"),
        pytest.param(3, True, True, "block", id="zero3-masked-compiled", marks=pytest.mark.slow),
        pytest.param(2, False, True, "null", id="zero2"),
        pytest.param(1, False, False, "null", id="zero1"),
    ],
)
def test_losses_and_weights_follow_a_plain_torch_loop(stores, tmp_path, stage, masked, once, compiled):
    """The whole engine in fp32 against the same model, batches and AdamW without DeepSpeed."""
    config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    config["bf16"] = {"enabled": False}
    (tmp_path / "fp32.json").write_text(json.dumps(config))
    more = ["training.tokens=6144", "training.micro_batch_sequences=2"]  # 3 micro-steps on each of 2 ranks
    more += [
        f"data.document_masking={str(masked).lower()}",
        f"training.reduce_once={str(once).lower()}",
        f"training.compile={compiled}",
        f"training.deterministic={str(stage == 2).lower()}",
    ]
    train(stores, tmp_path / "run", *more, extra=("--deepspeed", str(tmp_path / "fp32.json")))
    recipe, mixture = recipe_of(tmp_path / "run"), mixture_of(tmp_path / "run", stores)

    model = Llama(recipe.model)
    model.initialize(recipe.training.seed)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for step in range(8):
        ids, targets = mixture.fetch(range(12 * step, 12 * step + 12))
        separator = mixture.separator_id if masked else None
        loss = model(**model_inputs(ids, targets, separator, torch.device("cpu"))) / int((targets >= 0).sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(768 * step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)
    trained = weights(checkpoint.resolve(tmp_path / "run"))
    for name, parameter in hf_parameters(model):
        # Adam makes a step of 3e-3 of the smallest gradient: where that is near its epsilon, the order of sums shows.
        torch.testing.assert_close(trained[name], parameter, rtol=1e-3, atol=5e-5, msg=name)


def test_validation_is_the_mean_over_all_ranks(finished_run, stores):
    logged = next(entry["validation"] for entry in metrics(finished_run) if "validation" in entry)
    model, _ = checkpoint.load_model(finished_run, dtype="bfloat16")
    for name in ("prose", "code"):
        held_out = HeldOut(Source(name, stores / name, 1.0), 64)
        windows = min(8, held_out.num_windows)
        ids, targets = map(torch.from_numpy, held_out.fetch(range(windows)))
        with torch.no_grad():
            loss = model(ids, targets).item() / int((targets >= 0).sum())
        assert logged[name]["loss"] == pytest.approx(loss, rel=2e-3)
        assert logged[name]["targets"] == int((targets >= 0).sum())
        size = TextBytes(stores / "tokenizer.model").of(held_out, 8)
        bits = logged[name]["loss"] * logged[name]["targets"] / math.log(2)
        assert logged[name]["bits_per_byte"] == pytest.approx(bits / size)


def start(stores: Path, run: Path, *more: str, extra: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinyllama", "train", "--recipe", "demo", "--data", str(stores)]
    command += ["--output", str(run), "--num-accelerators", "2", *settings(*more), *extra]
    environment = {**os.environ, "HERE": str(run)}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count('"lr"') >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach step {step}")


def wait_until_held(run: Path, process: subprocess.Popen[str]) -> None:
    """Until both ranks wait where `--inject hold=...` has them wait."""
    while not all((run / f"held-{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def content(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def refused(stores: Path, run: Path, *more: str) -> None:
    """Every way to start a second run where one trains is one line, and touches nothing."""
    before = content(run)
    told = [f"error: {run} is in use by tinyllama train (pid "]
    for resume in ("auto", "never"):
        done = train(stores, run, *more, extra=("--resume", resume), check=False)
        assert done.returncode == 2
        assert [line[: len(told[0])] for line in done.stderr.splitlines()] == told
    train(stores, run, *more, extra=("--dry-run",))
    plain = [
        sys.executable,
        str(ROOT / "train" / "pretrain.py"),
        "--deepspeed",
        str(ROOT / "ds_configs" / "zero3.json"),
    ]
    plain += ["--recipe", "demo", "--data", str(stores), "--output", str(run)]
    alone = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(plain, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert [line[: len(told[0])] for line in done.stderr.splitlines()] == told
    assert content(run) == before


def test_killed_and_interrupted_runs_end_with_the_same_weights_bit_for_bit(stores, tmp_path):
    more = ["training.tokens=15360"]  # 20 steps
    train(stores, tmp_path / "whole", *more)
    run = tmp_path / "broken"

    process = start(stores, run, *more, extra=("--inject", "hold=forward@7"))
    wait_until_held(run, process)
    # Step 6 is written in the background.
    assert until(lambda: [step for step, _ in checkpoint.list_checkpoints(run)] == [3, 6])
    # DeepSpeed never removes its shared buffers, 66 MiB a rank: mapped without a name, they go with the process.
    for pid in ranks_below(process.pid):
        shared = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "deepspeed_allreduce" in line]
        assert len(shared) == 2
        assert all(line.endswith("(deleted)") for line in shared)
    refused(stores, run, *more)
    assert len(members(f"HERE={run}")) == 5  # the command, its guardian, DeepSpeed's launcher, two ranks
    process.kill()
    process.communicate()
    assert until(lambda: not members(f"HERE={run}"))
    before = checkpoint.list_checkpoints(run)
    assert before[-1][0] == 6
    (run / "checkpoints" / "partial-step-00000007").mkdir()
    for rank in (0, 1):
        (run / f"held-{rank}").unlink()

    process = start(stores, run, *more, extra=("--inject", "hold=forward@10"))
    wait_until_held(run, process)
    process.send_signal(
        signal.SIGHUP
    )  # SIGUSR1 and others in test_stopping, SIGTERM in test_slurm, Ctrl-C in test_demo
    output, _ = process.communicate(timeout=120)  # the ranks are held until it has reached them
    assert process.returncode == 75, output
    assert "resumed from" in output
    assert checkpoint.list_checkpoints(run)[-1][0] == 11
    assert "stopped by a signal after step 11;" in output
    assert not list((run / "checkpoints").glob("partial-*"))

    train(stores, run, *more, extra=("--resume", "must"))
    train(stores, run, *more)  # nothing to do
    assert losses(run) == losses(tmp_path / "whole")
    started = [entry["step"] for entry in metrics(run) if "started" in entry]
    assert started == [0, 6, 11]
    whole, broken = (weights(checkpoint.resolve(r)) for r in (tmp_path / "whole", run))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not (run / ".lock").exists()


def test_a_compiler_killed_in_a_run_before_does_not_hold_up_this_one():
    """torch's lock file outlives its process, and DeepSpeed waits for it for ever."""
    lock = extensions_folder() / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    script = "from train.distributed import build_operators; build_operators({'zero_optimization': {}})"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=240, check=True)
    assert not lock.exists()


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_continues_the_same_run(finished_run, stores, tmp_path, ranks):
    """2 ranks to 1 or 3: same global batches, losses within the reordering of bf16 sums."""
    run = tmp_path / "other"
    shutil.copytree(finished_run, run)
    for step in (6, 9):
        shutil.rmtree(run / "checkpoints" / checkpoint.step_name(step))
    train(stores, run, "training.tokens=6912", ranks=ranks)
    assert json.loads((checkpoint.resolve(run) / "state.json").read_text())["ranks"] == ranks
    assert losses(run) == pytest.approx(losses(finished_run), rel=2e-3)
    assert losses(run)[:3] == losses(finished_run)[:3]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])  # one class in DeepSpeed
def test_every_stage_resumes_itself_bit_for_bit_and_goes_on_with_stage_3s_checkpoint(
    finished_run, stores, tmp_path, stage
):
    """bf16. Stage 1 then has an optimizer class of its own; both start from any stage's checkpoint."""
    config = ("--deepspeed", f"zero{stage}")
    train(stores, tmp_path / "whole", "training.tokens=6912", extra=config)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (9, 6):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / checkpoint.step_name(step))
    train(stores, tmp_path / "parts", "training.tokens=6912", extra=config)
    whole, parts = (weights(checkpoint.resolve(tmp_path / name)) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert losses(tmp_path / "whole") == pytest.approx(losses(finished_run), abs=2e-3)

    shutil.copytree(finished_run, tmp_path / "other")
    for step in (9, 6):
        shutil.rmtree(tmp_path / "other" / "checkpoints" / checkpoint.step_name(step))
    done = train(stores, tmp_path / "other", "training.tokens=6912", extra=config)
    assert "resumed from" in done.stdout + done.stderr
    assert losses(tmp_path / "other") == pytest.approx(losses(finished_run), abs=2e-3)
    expected = weights(checkpoint.resolve(finished_run))
    for name, tensor in weights(checkpoint.resolve(tmp_path / "other")).items():
        # In bf16 the order of sums decides the sign of the smallest gradients, and Adam moves by the sign.
        assert (tensor - expected[name]).abs().mean() < 1e-4, name


@pytest.mark.parametrize(
    ("name", "change", "tolerance"),
    [
        ("zero3", {"sub_group_size": 50_000}, 5e-4),
        # Slow: DeepSpeed compiles its Adam for the processor.
        pytest.param("zero3_offload", {"sub_group_size": 50_000}, 5e-4, marks=pytest.mark.slow),
        ("zero3_hierarchical", {"zero_hpz_partition_size": 2}, 0),
    ],
)
def test_other_forms_of_stage_3_go_on_with_its_checkpoint(finished_run, stores, tmp_path, name, change, tolerance):
    """Offloaded, DeepSpeed's own Adam makes the step; sub-groups, of which larger models have many, change the order of the
    gradient norm's sum; a second copy of the weights changes nothing at all.
    """
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    config["zero_optimization"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copytree(finished_run, tmp_path / "run")
    for step in (9, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint.step_name(step))
    train(stores, tmp_path / "run", "training.tokens=6912", extra=("--deepspeed", str(tmp_path / "config.json")))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished_run), abs=tolerance)


def test_a_broken_newest_checkpoint_is_skipped_with_a_warning(finished_run, stores, tmp_path):
    run = tmp_path / "corrupt"
    shutil.copytree(finished_run, run)
    shard = run / "checkpoints" / checkpoint.step_name(9) / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    shutil.copytree(run / "checkpoints" / checkpoint.step_name(6), run / "checkpoints" / "partial-step-00000012")
    done = train(stores, run, "training.tokens=6912")
    assert "skipping checkpoint" in done.stderr
    assert "shard-00001.safetensors does not match its checksum" in done.stderr
    assert checkpoint.step_name(6) in done.stdout
    mended = weights(run / "checkpoints" / checkpoint.step_name(9))
    original = weights(finished_run / "checkpoints" / checkpoint.step_name(9))
    assert all(torch.equal(mended[name], original[name]) for name in mended)


SNAPSHOTS = """
import os, shutil, sys
from dataclasses import replace
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])
import deepspeed, torch
from tinyllama.model.llama import Llama
from train.plan import read_deepspeed, resolve_deepspeed
from train.pretrain import parameter_groups
from train.recipe import load_recipe
from train.distributed import init_distributed
from train.saver import Saver

run, snapshots = Path(sys.argv[1]), Path(sys.argv[2])
recipe = load_recipe("demo", sys.argv[4:])
config, _ = resolve_deepspeed(read_deepspeed("ds_configs/zero3.json"), recipe, 1)
init_distributed(config)
model = Llama(recipe.model)
model.initialize(1)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(parameter_groups(model, recipe)), config=config)
ids = torch.ones(engine.train_micro_batch_size_per_gpu(), 64, dtype=torch.int64)
for _ in range(engine.gradient_accumulation_steps()):
    engine.backward(engine(ids, ids))
    engine.step()
taken, busy = 0, False

def snapshot(event, arguments):
    global taken, busy
    touched = any(str(run) in str(argument) for argument in arguments)
    if not busy and touched and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        busy = True
        shutil.copytree(run, snapshots / f"{taken:04d}")
        taken, busy = taken + 1, False

state = {"step": 1, "tokens": 768, "optimizer_steps": 1, "mixture_sha256": "", "recipe": recipe.to_dict()}
control = torch.distributed.new_group(backend="gloo")
config = replace(recipe.checkpoint, keep_last=2, proof=False)
saver = Saver(run, config, None, control, lambda phase: None)
saver.save(engine, state)
saver.wait()
sys.addaudithook(snapshot)
for step in (2, 3, 3):  # the third pushes out the first; the fourth writes one that is there already
    saver.save(engine, {**state, "step": step})
    saver.wait()
os._exit(0)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_valid_checkpoint(tmp_path):
    """Fault 14. What is on disk before each touch of a file is what a SIGKILL there would leave behind."""
    (tmp_path / "run").mkdir()
    (tmp_path / "snapshots").mkdir()
    arguments = [tmp_path / "run", tmp_path / "snapshots", free_port(), *settings()[1::2]]
    command = [sys.executable, "-c", SNAPSHOTS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    moments = sorted((tmp_path / "snapshots").iterdir())
    assert len(moments) >= 20
    steps, warnings = [], []
    for moment in moments:
        found = checkpoint.newest_whole(moment, warnings.append)
        assert found is not None, moment
        steps.append(found[1]["step"])
        assert sum(tensor.numel() for tensor in weights(found[0]).values()) == recipe_parameters()
    assert not warnings  # what has a checkpoint's name is one
    assert steps[0] == 1
    assert steps[-1] == 3
    assert set(steps) == {1, 2, 3}


def recipe_parameters() -> int:
    from train.recipe import load_recipe

    return load_recipe("demo", settings()[1::2]).model.num_parameters


def test_checkpoints_are_chosen_by_number():
    assert checkpoint.step_name(999_999_99) == "step-99999999"
    assert checkpoint.step_name(100_000_000) == "step-100000000"


def test_newest_is_the_largest_number_not_the_last_name(tmp_path):
    for step in (999_999, 1_000_000, 99_999_999, 100_000_000):
        (tmp_path / "checkpoints" / checkpoint.step_name(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "partial-step-999999999").mkdir()
    assert [s for s, _ in checkpoint.list_checkpoints(tmp_path)] == [999_999, 1_000_000, 99_999_999, 100_000_000]


@pytest.mark.parametrize(
    ("more", "extra", "words"),
    [
        (["model.num_hidden_layers=3"], (), "model.num_hidden_layers=2"),
        (["data.seed=4"], (), "data.seed=3407"),
        ([], ("--resume", "never"), "has checkpoints"),
    ],
)
def test_a_resume_under_other_settings_is_refused(finished_run, stores, more, extra, words):
    done = train(stores, finished_run, "training.tokens=6912", *more, extra=extra, check=False)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert words in done.stderr


def test_mistakes_are_one_line_before_anything_is_launched(stores, tmp_path):
    for arguments, words in (
        (["--data", tmp_path], "tinyllama data prepare"),
        (["--data", stores, "--recipe", "tinylama_1.1b"], "did you mean tinyllama_1.1b"),
        (["--data", stores, "--deepspeed", "nothing.json"], "nothing.json does not exist"),
        (["--data", stores, "--resume", "maybe"], "--resume maybe"),
    ):
        recipe = [] if "--recipe" in arguments else ["--recipe", "demo"]
        done = tinyllama("train", *recipe, *arguments, *settings("training.tokens=7680"), check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_launcher_alone_starts_the_same_script(stores, tmp_path):
    """`deepspeed train/pretrain.py --deepspeed ds_configs/zero3.json`, as the README has it."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), "train/pretrain.py"]
    command += ["--deepspeed", "ds_configs/zero3.json", "--recipe", "demo", "--data", str(stores)]
    command += ["--output", str(tmp_path / "run"), *settings("training.tokens=1536", "optimizer.warmup_steps=1")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 2
    # Without data, one line says which command prepares them.
    command[command.index(str(stores))] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "tinyllama data prepare" in errors[0]


def test_slices_give_any_range_of_any_tensor(finished_run):
    folder = checkpoint.resolve(finished_run)
    slices = checkpoint.Slices(folder)
    name = "model.embed_tokens.weight"
    whole = slices.read("weight", name, 0, 600 * 128)
    for start, stop in ((0, 1), (38_399, 38_401), (100, 60_000), (76_799, 76_800)):
        np.testing.assert_array_equal(slices.read("weight", name, start, stop), whole[start:stop])
    with pytest.raises(CheckpointError, match="lacks elements"):
        slices.read("weight", name, 0, 600 * 128 + 1)
