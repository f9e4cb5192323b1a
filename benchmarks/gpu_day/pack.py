"""What a GPU machine without a network lacks, gathered into `.gpu/`: wheels, a token store of 32,000 pieces, its tokenizer.

    benchmarks/gpu_day.sh pack [--for-python 3.12]

The wheels are those named below. The text is what CPython ships (`tinyllama data corpus`). What exists
already is kept. The folder and the tree together must stay below 40 MiB, so that they can be carried; the figure is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = ROOT / ".gpu"
LIMIT_BYTES = 40 * 2**20
VOCAB_SIZE = 32000  # the 1.1B recipe's
SOURCES = {"prose": "slimpajama", "code": "starcoder"}  # our corpus under the names of the recipes' sources
# As source: DeepSpeed, without a compiler of its operators, so that its wheel fits any machine.
FROM_SOURCE = ("deepspeed==0.19.8",)
PURE = ("hjson==3.1.0", "py-cpuinfo==9.0.0", "annotated-types==0.8.0", "typing-inspection==0.4.5")
# pydantic asks for exactly one version of pydantic-core.
COMPILED = ("liger-kernel==0.8.5", "pydantic==2.14.3", "pydantic-core==2.50.4", "torchao==0.18.0")


def run(command: Sequence[str], **environment: str) -> None:
    """Run a command to its end; its whole output is the error where it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stdout}\n{done.stderr}")


def gather_wheels(folder: Path, for_python: str) -> None:
    """All wheels, made beside the folder and moved there once they are complete."""
    wanted = [*FROM_SOURCE, *PURE, *COMPILED]
    listed = folder / "complete.json"
    if listed.exists() and json.loads(listed.read_text()) == [for_python, *wanted]:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(partial)]
    run([*build, *FROM_SOURCE], DS_BUILD_OPS="0")
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "any")
    asked = [argument for platform in platforms for argument in ("--platform", platform)]
    get = [*pip, "download", "--quiet", "--no-deps", "--dest", str(partial), "--only-binary", ":all:"]
    run([*get, "--python-version", for_python, *asked, *PURE, *COMPILED])
    (partial / "complete.json").write_text(json.dumps([for_python, *wanted]))
    os.replace(partial, folder)


def make_data(folder: Path) -> None:
    """Tokenizer and token stores of the shipped corpus, by the toolkit's own commands."""
    if (folder / "tokenizer.model").exists():
        return
    tinyllama = [sys.executable, "-m", "tinyllama"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as partial:
        text, made = Path(partial) / "text", Path(partial) / "data"
        run([*tinyllama, "data", "corpus", "--output", str(text)], PYTHONPATH=path)
        model = made / "tokenizer.model"
        made.mkdir()
        learn = ["tokenizer", "train", str(text), "--output", str(model), "--vocab-size", str(VOCAB_SIZE)]
        run([*tinyllama, *learn], PYTHONPATH=path)
        for name, source in SOURCES.items():
            prepare = ["data", "prepare", str(text / f"{name}.jsonl"), "--output", str(made / source)]
            more = ["--tokenizer", str(model), "--validation-fraction", "0.02"]
            run([*tinyllama, *prepare, *more], PYTHONPATH=path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)


def tree_files() -> list[Path]:
    """Every file of the working tree but those that git ignores; outside of a repository, every file."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file() and PACK not in path.parents]
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def check_size(tree_bytes: int, pack_bytes: int, limit: int = LIMIT_BYTES) -> str:
    """The line that says how much must be carried; SystemExit where that is too much."""
    total = tree_bytes + pack_bytes
    line = f"tree {tree_bytes / 2**20:.1f} + pack {pack_bytes / 2**20:.1f} = {total / 2**20:.1f} MiB of {limit / 2**20:.0f}"
    if total > limit:
        sys.exit(f"error: {line}: too much to carry; leave out a package of benchmarks/gpu_day/pack.py or some data")
    return line


def commit() -> str:
    """The commit that is packed, marked if the tree has changes: the GPU machine has no repository to ask."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or os.environ.get("PACKED_COMMIT", "unknown")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_day.sh pack", description="Gather what a GPU machine lacks.")
    parser.add_argument("--for-python", default="3.12", help="version of the GPU machine's Python (default 3.12)")
    given = parser.parse_args(argv)
    gather_wheels(PACK / "wheels", given.for_python)
    make_data(PACK / "data")
    (PACK / "pack.json").write_text(json.dumps({"commit": commit()}) + "\n")
    packed = [path for path in PACK.rglob("*") if path.is_file()]
    for path in sorted((PACK / "wheels").glob("*.whl")):
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path.name}")
    sizes = [sum(path.stat().st_size for path in files) for files in (tree_files(), packed)]
    print(f"{PACK}: {check_size(*sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
