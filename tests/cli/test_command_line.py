"""The command line: fast, light, with examples everywhere and exit codes that mean something."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tinyllama

from tinyllama.cli.app import print_error

HEAVY = {"torch", "numpy", "transformers", "deepspeed", "lm_eval", "vllm", "datasets", "sentencepiece", "matplotlib"}
COMMANDS = (
    ["tokenizer", "train"],
    ["tokenizer", "export"],
    ["data", "corpus"],
    ["data", "prepare"],
    ["data", "verify"],
    ["data", "inspect"],
    ["train"],
    ["export"],
    ["eval"],
    ["eval-data", "pull"],
    ["eval-data", "pack"],
    ["eval-data", "verify"],
    ["compare"],
    ["serve"],
    ["plan"],
    ["report"],
    ["demo"],
)


def test_help_imports_nothing_heavy():
    code = "import sys\nfrom tinyllama.cli.app import build\nbuild()\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}


UNBUFFERED = ({}, {"PYTHONUNBUFFERED": "1"})  # then a write fails at once, otherwise only as the program ends


def ended(arguments: list[str], unbuffered: dict[str, str], **streams) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyllama", *arguments]
    return subprocess.run(command, env={**os.environ, **unbuffered}, text=True, check=False, **streams)


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
def test_the_exit_code_stands_where_the_error_cannot_be_written(unbuffered):
    with open("/dev/full", "w") as full:
        for arguments, code in ((["report", "/nosuch"], 2), (["--version"], 0)):
            assert ended(arguments, unbuffered, stderr=full).returncode == code


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["plan", "--loss", "2.5", "--json"], ["plan", "--help"]]
)
def test_an_output_that_cannot_be_written_is_one_line(arguments, unbuffered):
    with open("/dev/full", "w") as full:
        done = ended(arguments, unbuffered, stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == (
        "error: writing the output failed (No space left on device); free space, or send it elsewhere\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
def test_a_reader_that_has_gone_is_told_nothing(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = ended(["--help"], unbuffered, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_error_is_one_line_of_text_whatever_value_it_shows(capsys):
    print_error("a\nb\x1b[31m\r\udcff é [red]; fix")
    assert capsys.readouterr().err == "error: a b\\x1b[31m\\r\\udcff é [red]; fix\n"
    print_error("x" * 10**6 + "; the fix")
    shown = capsys.readouterr().err
    assert (len(shown) < 4000, shown.count("\n"), shown.endswith("; the fix\n")) == (True, 1, True)


@pytest.mark.alone
def test_help_takes_well_under_half_a_second():
    """Of the processor's time, of which it needs 0.3 s: what else this machine does is not its own."""
    tinyllama("--help")
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = tinyllama("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.6, times
    for command in ("data", "tokenizer", "train", "export", "eval", "serve", "plan", "report", "demo"):
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples(command):
    done = tinyllama(*command, "--help")
    assert "Example" in done.stdout
    assert f"tinyllama {' '.join(command)}" in done.stdout


def test_version_and_completion():
    assert tinyllama("--version").stdout.startswith("tinyllama 0.")
    # Typer finds out the user's shell by itself; here it is named.
    script = Path(sys.executable).with_name("tinyllama")
    environment = {**os.environ, "_TINYLLAMA_COMPLETE": "source_bash"}
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment, check=False)
    assert "complete -o default -F" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["data", "prepare", "missing.jsonl", "--output", "x", "--tokenizer", "missing.model"],
        ["data", "verify", "missing"],
        ["export", "missing", "--output", "x"],
        ["export", "", "--output", "empty"],
        ["eval", "--model", "missing", "--tasks", "commonsense"],
        ["serve", "missing"],
    ],
    ids=lambda a: a[0] + "-" + a[-1],
)
def test_mistakes_exit_with_two_and_no_traceback(arguments, tmp_path):
    done = tinyllama(*arguments, check=False, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_packages_do_not_import_one_another():
    """train, evalsuite and serve may import tinyllama, never one another; tinyllama none of them."""
    packages = {"tinyllama", "train", "evalsuite", "serve"}
    for package in packages:
        allowed = {package} if package == "tinyllama" else {package, "tinyllama"}
        for path in (ROOT / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if len(words) > 1 and words[0] in ("import", "from"):
                    imported = words[1].split(".")[0]
                    assert imported not in packages - allowed, f"{path}: {line}"


def test_no_module_hides_an_installed_package():
    """The launcher puts train/ first on the path; a module named like a package there breaks others in odd ways."""
    import importlib.util

    names = {p.stem for p in (ROOT / "train").glob("*.py")} - {"__init__", "__main__"}
    environment = {**os.environ, "PYTHONPATH": ""}
    for name in names:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        done = subprocess.run([sys.executable, "-I", "-c", code], env=environment, check=False)
        assert done.returncode == 0, name
    assert importlib.util.find_spec("train") is not None


def test_wheel_works_outside_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Builds the wheel, installs it into a clean environment and runs it there."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would bring the checkout back in
    run = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = str(tmp_path / "clean" / "bin" / "tinyllama")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "demo" in done.stdout
    names = subprocess.run(
        [str(python), "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    data_files = (
        "train/recipes/tinyllama_1.1b.json",
        "ds_configs/zero3.json",
        "evalsuite/bundles/mini/",
        "tinyllama/planner/prices.json",
        "tinyllama/report/page.css",
        "tinyllama/report/page.js",
    )
    for needed in data_files:
        assert needed in names
    # What needs an extra says which one.
    done = subprocess.run([command, "train"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "tinyllama[" in done.stderr
