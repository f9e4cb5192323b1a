"""What lies where an export is to go: an earlier export is replaced, and nothing that is no part of one is ever lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from test_stored import hugging_face

from tinyllama import quantize
from tinyllama.errors import ConfigError
from tinyllama.model_source import RECORD


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exports") / "small"
    quantize.export_quantized(llama, target, "int8", check=False)
    return target


@pytest.fixture
def target(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "exports" / "small"))


def content(folder: Path) -> dict[str, str]:
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): file.read_bytes().hex() for file in files}


def refused(source: Path, target: Path, match: str) -> None:
    """Nothing is written or removed anywhere beside the target."""
    before = content(target.parent)
    with pytest.raises(ConfigError, match=match):
        quantize.export_quantized(source, target, "int8", check=False)
    assert content(target.parent) == before


def test_the_record_lists_the_files_and_an_earlier_export_is_replaced(llama: Path, target: Path):
    assert {*json.loads((target / RECORD).read_text())["files"], RECORD} == set(os.listdir(target))
    (target / ".DS_Store").touch()
    quantize.export_quantized(llama, target, "fp8", check=False)
    assert json.loads((target / RECORD).read_text())["quantization"]["scheme"] == "fp8"
    assert os.listdir(target.parent) == ["small"]


@pytest.mark.parametrize("name", ["eval/results.json", "README.md"])
def test_what_somebody_put_into_an_export_is_kept(llama: Path, target: Path, name: str):
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("{}")
    refused(llama, target, f"holds {name.partition('/')[0]}, which is no part of the export; move it away")


def test_a_record_of_an_older_release_lists_nothing(llama: Path, target: Path):
    (target / RECORD).write_text("{}")
    (target / "README.md").touch()
    quantize.export_quantized(llama, target, "int8", check=False)
    assert not (target / "README.md").exists()


def test_a_model_inside_its_target_is_kept(llama: Path, target: Path):
    inside = Path(shutil.copytree(llama, target / "source"))
    refused(inside, target, "holds source")


def test_a_link_is_refused_before_the_work(llama: Path, target: Path):
    link = target.with_name("latest")
    link.symlink_to("small")
    refused(llama, link, f"is a link; give the folder itself, {target.resolve()}")
    assert link.is_symlink()


def test_a_name_that_means_unfinished_is_refused(llama: Path, tmp_path: Path):
    refused(llama, tmp_path / "small.partial", "unfinished")


def test_what_comes_while_the_export_is_written_is_kept(llama: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    check = quantize.check_weights

    def meanwhile(*arguments):
        (target / "eval").mkdir()
        return check(*arguments)

    monkeypatch.setattr(quantize, "check_weights", meanwhile)
    with pytest.raises(ConfigError, match="holds eval"):
        quantize.export_quantized(llama, target, "fp8", check=False)
    assert (target / "eval").is_dir()
    assert os.listdir(target.parent) == ["small"]


def test_an_interrupt_while_the_earlier_export_is_removed(llama: Path, target: Path, monkeypatch: pytest.MonkeyPatch):
    remove, interrupts = shutil.rmtree, iter([KeyboardInterrupt])

    def interrupted(path, **options):
        if str(path).endswith(".old.partial") and Path(path).exists() and (error := next(interrupts, None)):
            raise error
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize.export_quantized(llama, target, "fp8", check=False)
    assert json.loads((target / RECORD).read_text())["quantization"]["scheme"] == "fp8"
    assert os.listdir(target.parent) == ["small"]


def test_what_a_killed_export_left_goes_with_the_next(llama: Path, target: Path):
    target.rename(target.with_name("small.old.partial"))
    quantize.export_quantized(llama, target, "fp8", check=False)
    assert os.listdir(target.parent) == ["small"]
