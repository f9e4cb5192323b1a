"""MODEL, the same for every command: what it names, and one line, at once and without a network, for what names nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WITHOUT_PRIVILEGES, skip_unless_privileges_can_be_dropped

from tinyllama import checkpoint, model_source
from tinyllama.errors import UserError
from tinyllama.model.config import ModelConfig

# Runs the commands given as JSON, one after the other in one process; prints exit code, error and processor seconds of each.
# Nothing may be looked up or connected to.
RUNNER = """
import json, sys, time
from typer.testing import CliRunner
from tinyllama.cli.app import build
from tinyllama.errors import UserError

def refuse_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise AssertionError(f"network: {event} {arguments}")

sys.addaudithook(refuse_network)
app, found = build(), []
for command in json.loads(sys.argv[1]):
    began = time.process_time()
    result = CliRunner().invoke(app, command)
    error = result.exception
    code = 2 if isinstance(error, UserError) else result.exit_code
    found.append([code, str(error), time.process_time() - began])
heavy = sorted({"torch", "transformers", "vllm", "lm_eval", "huggingface_hub", "datasets"} & set(sys.modules))
print(json.dumps([found, heavy]))
"""


def commands(model: str) -> list[list[str]]:
    return [
        ["eval", "--model", model],
        ["eval", "--model", model, "--data-dir", "mini", "--backend", "hf"],
        ["eval", "--model", model, "--backend", "vllm", "--dtype", "bfloat16"],
        ["serve", model],
        ["export", model, "--output", "out"],
        ["export", model, "--output", "out", "--quantize", "int8"],
        ["compare", model, model + "2"],
    ]


def finished(folder: Path, step: int) -> None:
    """A checkpoint that has all but numbers in its shard."""
    recipe = {"model": ModelConfig().to_dict()}
    state = {"step": step, "tokens": 1, "optimizer_steps": step, "ranks": 1, "mixture_sha256": "", "recipe": recipe}
    content = {"state.json": json.dumps(state), "shard-00000.safetensors": "x", "rng-00000.json": "{}"}
    folder.mkdir(parents=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    sums = {name: {"bytes": len(t), "sha256": hashlib.sha256(t.encode()).hexdigest()} for name, t in content.items()}
    (folder / "manifest.json").write_text(checkpoint.manifest_text(sums))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run, an export and things that are no models; an empty cache of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-home"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for step in (9, 10):
        finished(tmp_path / "runs" / "demo" / "checkpoints" / f"step-{step:08d}", step)
    (tmp_path / "runs" / "demo" / "config.json").write_text('{"recipe": {}}')
    (tmp_path / "runs" / "demo" / "checkpoints" / "partial-step-11").mkdir()
    (tmp_path / "exports" / "small").mkdir(parents=True)
    (tmp_path / "exports" / "small" / "config.json").write_text('{"model_type": "llama", "architectures": []}')
    return tmp_path


def test_what_a_name_stands_for(here: Path):
    newest = "runs/demo/checkpoints/step-00000010"
    for given, kind, location in (
        ("runs/demo", "checkpoint", newest),
        ("runs/demo/", "checkpoint", newest),
        (str(here / "runs" / "demo"), "checkpoint", str(here / newest)),
        (newest, "checkpoint", newest),
        ("runs/demo/checkpoints/step-00000009/", "checkpoint", "runs/demo/checkpoints/step-00000009"),
        ("exports/small", "directory", "exports/small"),
        ("./exports/../exports/small", "directory", "exports/../exports/small"),
    ):
        found = model_source.find(given)
        assert (found.kind, found.location) == (kind, location), given
    assert model_source.find("runs/demo").name == "demo-step-00000010"
    assert model_source.find("exports/small/").name == "small"


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(here))
    assert model_source.find("~/exports/small").path == here / "exports" / "small"


def test_a_cached_hub_model_needs_no_network(here: Path):
    for name in ("gpt2", "owner/some-model", "exports/of-the-hub"):
        repository = here / "hub-home" / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        (repository / "snapshots" / "abc").mkdir(parents=True)
        (repository / "snapshots" / "abc" / "config.json").write_text('{"model_type": "gpt2"}')
        found = model_source.find(name)
        assert (found.kind, found.location, found.content_sha256()) == ("hub", name, f"hub:{name}")
        assert found.config["model_type"] == "gpt2"
        offline = model_source.find(name, offline=True)
        assert offline.loadable == str(repository / "snapshots" / "abc")
        with pytest.raises(UserError, match="no weights"):
            offline.check(ours=False)
    with pytest.raises(UserError, match="is a hub id"):
        model_source.find("gpt2").check(ours=True)
    with pytest.raises(UserError, match="gpt2 does not exist"):
        model_source.find("gpt2", local=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("runs/typo", "does not exist"),
        ("runs/dem", "did you mean runs/demo?"),
        ("run/demo", "did you mean runs/demo?"),
        ("runs/Demo", "did you mean runs/demo?"),
        ("runs/demo/checkpoints/step-9", "step-00000009"),
        ("exports/smal/", "did you mean exports/small?"),
        ("export5/small", "did you mean exports/small?"),
        ("./x", "./x does not exist"),
        ("/abs/x", "/abs/x does not exist"),
        ("x/", "x/ does not exist"),
        ("~/nope-nope", "~/nope-nope does not exist"),
        ("~nobody-here/x", "does not exist"),
        ("typo", "typo does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("a b", "a b does not exist"),
        ("-x/y", "does not exist"),
        ("a/..", "does not exist"),
        ("x.safetensors", "x.safetensors does not exist"),
        ("", "is no model"),
        ("a\0b", "is no model"),
        ("x" * 300, "cannot be read (File name too long)"),
        ("runs", "give one of runs/demo"),
        ("empty", "the folder is empty"),
        ("file", "is a file, not a model directory"),
        ("exports/small/config.json", "give its folder, exports/small"),
        ("file/x", "does not exist"),
        ("exports/new.partial", "is unfinished"),
        ("runs/demo/checkpoints/partial-step-11", "is unfinished"),
        ("runs/other", "has no finished checkpoint"),
        ("runs/demo/checkpoints/step-00000012", "manifest.json is missing"),
        ("link", "is a link to something that does not exist"),
    ],
)
def test_what_names_nothing(here: Path, given: str, words: str):
    (here / "empty").mkdir()
    (here / "file").touch()
    (here / "exports" / "new.partial").mkdir()
    (here / "exports" / "new.partial" / "config.json").write_text('{"model_type": "llama"}')
    (here / "runs" / "other" / "checkpoints").mkdir(parents=True)
    (here / "runs" / "demo" / "checkpoints" / "step-00000012").mkdir()
    (here / "runs" / "demo" / "checkpoints" / "step-00000012" / "shard-00000.safetensors").touch()
    (here / "runs" / "demo" / "checkpoints" / "partial-step-11" / "x").touch()
    (here / "link").symlink_to("gone")
    with pytest.raises(UserError) as caught:
        model_source.find(given, "--model")
    assert words in str(caught.value)
    assert caught.value.fix


def test_every_command_says_it_at_once_without_torch_or_network(here: Path):
    names = ("runs/typo", "./x", "/abs/x", "x/", "exports/smal", "typo")
    asked = [command for name in names for command in commands(name)]
    asked.append(["eval", "--model", "exports/small", "--data-dir", "typo"])  # of a model that is there
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(asked)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    for command, (code, error, seconds) in zip(asked, found, strict=True):
        assert code == 2, (command, error)
        assert "does not exist" in error or "--data-dir typo is not a folder" in error
        assert seconds < 2, command
    assert not (here / "out").exists()


def test_an_id_of_the_hub_is_asked_for_once(here: Path, monkeypatch: pytest.MonkeyPatch):
    """At an address where nobody listens; and at one that never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        for endpoint, words in (
            ("127.0.0.1:9", "cannot be reached"),
            (f"127.0.0.1:{silent.getsockname()[1]}", "the hub"),
        ):
            code = (
                "import time; from tinyllama import model_source as m; from tinyllama.errors import UserError\n"
                "m.HUB_SECONDS = 3.0; began = time.monotonic()\n"
                "try: m.find('owner/name', '--model')\n"
                "except UserError as error: print(error); print(time.monotonic() - began)"
            )
            monkeypatch.setenv("HF_ENDPOINT", f"http://{endpoint}")
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
            line, seconds = done.stdout.splitlines()
            assert words in line
            assert float(seconds) < 8
            assert done.stderr == ""


def test_a_folder_that_may_not_be_read(here: Path):
    skip_unless_privileges_can_be_dropped()
    (here / "secret").mkdir(mode=0)
    code = "from tinyllama import model_source as m; m.find('secret')"
    command = [*WITHOUT_PRIVILEGES, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "secret cannot be read (Permission denied)" in done.stderr.splitlines()[-1]


def test_a_run_that_trains_on_does_not_change_what_is_evaluated(here: Path):
    from evalsuite.backends import ModelChoice

    choice = ModelChoice("runs/demo", "native", "float32", None)
    assert choice.source.path == here.relative_to(here) / "runs" / "demo" / "checkpoints" / "step-00000010"
    finished(here / "runs" / "demo" / "checkpoints" / "step-00000011", 11)
    assert checkpoint.resolve("runs/demo").name == "step-00000011"
    assert choice.source.path.name == "step-00000010"


def test_compare_names_a_model_that_is_no_result(here: Path):
    from tinyllama.cli.compare import kind

    with pytest.raises(UserError, match="is a model, and no result; measure it first"):
        kind(["exports/small"])
    with pytest.raises(UserError, match="holds neither"):
        kind(["runs"])
    with pytest.raises(UserError, match="did you mean exports/small"):
        kind(["exports/smal"])
