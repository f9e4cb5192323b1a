"""Hugging Face directories as bytes: what is damaged or ambiguous is one line, before torch is needed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from tinyllama import model_source
from tinyllama.errors import UserError
from tinyllama.model import stored
from tinyllama.model.config import ModelConfig, llama_tensors

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
TOKENIZER = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(40)}, "merges": []}}


def hugging_face(directory: Path, dtype: str = "float32", **options: Any) -> Path:
    """A Llama as transformers saves it, and the part of a tokenizer that is looked at."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2)).to(getattr(torch, dtype))
    model.save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("sharded") / "model", max_shard_size="6KB")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(directory: Path, ours: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        model_source.find(directory).check(ours=ours)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


def change(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: bytes | dict[str, Any], data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_headers_are_safetensors_own(tmp_path: Path, dtype: str):
    """An independent reader: the same names, types and shapes, whole and in shards."""
    from safetensors import safe_open

    for number, options in enumerate(({}, {"max_shard_size": "6KB"})):
        directory = hugging_face(tmp_path / str(number), dtype, **options)
        model_source.find(directory).check(ours=True)
        found = stored.tensors(directory)
        files = sorted(directory.glob("*.safetensors"))
        assert len(files) > 1 or not options
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a dictionary
                    theirs, ours = handle.get_slice(name), found.pop(name)
                    assert (ours.file, ours.dtype, list(ours.shape)) == (file, theirs.get_dtype(), theirs.get_shape())
        assert not found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [None, 8])
def test_expected_tensors_are_transformers_own(bias: bool, tied: bool, head_dim: int | None):
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {"attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied, "head_dim": head_dim}
    theirs = {k: tuple(v.shape) for k, v in LlamaForCausalLM(LlamaConfig(**SHAPE, **more)).state_dict().items()}
    ours = dict(llama_tensors({**SHAPE, **more}))
    if tied:
        del theirs["lm_head.weight"]
    assert ours == theirs


def test_expected_tensors_are_those_of_our_model():
    from tinyllama.model.hf import shapes

    config = ModelConfig(**SHAPE)
    assert dict(llama_tensors(config.to_hf())) == shapes(config)


FIRST = "model.embed_tokens.weight"


def damaged_headers() -> dict[str, Callable[[dict[str, Any], bytes], tuple[bytes | dict[str, Any], bytes]]]:
    def edit(**fields: Any) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
        return lambda header, data: ({**header, FIRST: {**header[FIRST], **fields}}, data)

    def overlap(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        moved = {**header["lm_head.weight"], "data_offsets": header[FIRST]["data_offsets"]}
        return {**header, "lm_head.weight": moved}, data

    def twice(header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
        return json.dumps(header).encode()[:-1] + f', "{FIRST}": {json.dumps(header[FIRST])}}}'.encode(), data

    def field_twice(header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
        return json.dumps(header).replace('"dtype": ', '"dtype": "F32", "dtype": ', 1).encode(), data

    return {
        "data cut off": lambda header, data: (header, data[:-4]),
        "data too long": lambda header, data: (header, data + b"\0"),
        "header cut off": lambda header, data: (json.dumps(header).encode()[:-9], data),
        "header is a list": lambda header, data: (b"[]  ", data),
        "header is null": lambda header, data: (b"null", data),
        "entry is a number": lambda header, data: ({**header, FIRST: 3}, data),
        "not UTF-8": lambda header, data: (b'{"\xff": {}}', data),
        "unknown type": edit(dtype="F33"),
        "type is a list": edit(dtype=["F32"]),
        "shape is text": edit(shape="40x16"),
        "shape below zero": edit(shape=[-40, -16]),
        "shape of truths": edit(shape=[True]),
        "another shape": edit(shape=[41, 16]),
        "offsets reversed": edit(data_offsets=[100, 0]),
        "three offsets": edit(data_offsets=[0, 1, 2]),
        "overlapping": overlap,
        "twice": twice,
        "a field twice": field_twice,
        "metadata are numbers": lambda header, data: ({**header, "__metadata__": {"format": 1}}, data),
    }


@pytest.mark.parametrize("what", damaged_headers())
def test_damaged_headers(model: Path, what: str):
    file = model / "model.safetensors"
    write(file, *damaged_headers()[what](*header_of(file)))
    assert "is corrupt" in refusal(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (POINTER, "is a git-lfs pointer"),
        (b"abc", "is corrupt"),
        (b"\xff" * 64, "is corrupt"),
        (b"<html>404</html>", "is corrupt"),
    ],
)
def test_files_that_hold_no_weights(model: Path, content: bytes, words: str):
    (model / "model.safetensors").write_bytes(content)
    assert words in refusal(model)


def test_every_cut_of_the_file_is_seen(model: Path):
    file = model / "model.safetensors"
    content = file.read_bytes()
    for size in [*range(40), *range(40, len(content), 509), len(content) - 1]:
        file.write_bytes(content[:size])
        refusal(model)


def copies(first: Path, second: Path, directory: Path, *files: str) -> Path:
    """The model `first`, and the single file of `second` under other names."""
    shutil.copytree(first, directory)
    for file in files:
        shutil.copy(second / "model.safetensors", directory / file)
    return directory


def test_two_sets_of_weights(whole: Path, sharded: Path, tmp_path: Path):
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    header, data = header_of(other / "model.safetensors")
    write(other / "model.safetensors", header, data[:-1] + bytes([data[-1] ^ 1]))
    for name, directory in {
        "single and shards": copies(sharded, other, tmp_path / "a", "model.safetensors"),
        "single and another": copies(whole, other, tmp_path / "b", "model-new.safetensors"),
        "an extra shard": copies(sharded, other, tmp_path / "c", "model-00009-of-00009.safetensors"),
        "pickles too": copies(whole, other, tmp_path / "d", "pytorch_model.bin"),
        "half of the pickles too": copies(sharded, other, tmp_path / "e", "pytorch_model-00001-of-00002.bin"),
    }.items():
        line = refusal(directory)
        assert "two sets of weights" in line, name
        assert "which one?" in line
        assert line.count("differs") + line.count("cannot be read") == 1, line


def test_the_same_weights_twice(whole: Path, sharded: Path, tmp_path: Path):
    """As many models are published; transformers takes the single file of safetensors, and so is it here."""
    for directory in (
        copies(sharded, whole, tmp_path / "a", "model.safetensors"),
        copies(whole, whole, tmp_path / "b", "model.fp32.safetensors", "consolidated.safetensors"),
    ):
        model_source.find(directory).check(ours=True)
        assert stored.find_weights(directory).files == [directory / "model.safetensors"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_safetensors_and_torch_format(model: Path, zipped: bool):
    import torch
    from safetensors.torch import load_file

    def save(tensors: dict[str, torch.Tensor]) -> None:
        torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    weights = load_file(model / "model.safetensors")
    query, mask = "model.layers.1.self_attn.q_proj.weight", {"layers.0.attn.bias": torch.ones(1, 1, 8, 8)}
    tied = {"tied.weight": weights["lm_head.weight"]}
    for same in (weights, {name: w.half() for name, w in weights.items()}, weights | mask | tied):
        save(same)
        model_source.find(model).check(ours=True)
        assert stored.find_weights(model).files == [model / "model.safetensors"]
    for words, different in {
        f"{query} differs": weights | {query: weights[query] + 1e-6},
        f"{query} has shape (16, 16) and (8, 16)": weights | {query: weights[query][:8]},
        f"the second has no {query}": {name: w for name, w in weights.items() if name != query},
        "the first has no more.weight": weights | {"more.weight": torch.ones(3, 3)},
        "does not hold tensors by name": {"state": weights},
    }.items():
        save(different)
        assert words in refusal(model)


def test_what_was_not_downloaded_and_what_is_no_set_of_weights(model: Path):
    """As full downloads, and those without torch's format, leave it."""
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    (model / "pytorch_model.bin").write_bytes(POINTER)
    for name in (
        "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.Q4_K_M.gguf", "training_args.bin", "optimizer.pt",
        "optimizer.bin", "rng_state.pth", "consolidated.00.pth", "original/consolidated.00.pth", "onnx/model.onnx",
        "onnx/model.safetensors",
    ):  # fmt: skip
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x")
    model_source.find(model).check(ours=True)


def test_an_index_of_one_file(whole: Path, tmp_path: Path):
    only = tmp_path / "index-of-one"
    shutil.copytree(whole, only)
    names = dict.fromkeys(header_of(only / "model.safetensors")[0], "model.safetensors")
    names.pop("__metadata__", None)
    (only / stored.INDEX).write_text(json.dumps({"weight_map": names}))
    model_source.find(only).check(ours=True)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: [], "has no weight_map"),
        (lambda m: {}, "has no weight_map"),
        (lambda m: {**m, FIRST: "../x.safetensors"}, "is no file beside it"),
        (lambda m: {**m, FIRST: "/etc/x.safetensors"}, "is no file beside it"),
        (lambda m: {**m, FIRST: 3}, "is no file beside it"),
        (lambda m: {**m, FIRST: "model-00077-of-00077.safetensors"}, "does not exist"),
        (lambda m: {**m, "model.more.weight": m[FIRST]}, "lacks model.more.weight"),
        (lambda m: {k: v for k, v in m.items() if k != FIRST}, "by the index nowhere"),
        (lambda m: {**m, FIRST: m["lm_head.weight"]}, "by the index in model-"),
    ],
)
def test_indexes_that_are_not_of_their_files(sharded: Path, tmp_path: Path, edit: Callable[[Any], Any], words: str):
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = json.loads((directory / stored.INDEX).read_text())
    assert index["weight_map"][FIRST] != index["weight_map"]["lm_head.weight"]
    (directory / stored.INDEX).write_text(json.dumps({**index, "weight_map": edit(index["weight_map"])}))
    assert words in refusal(directory)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"weight_map": {}, "weight_map": {}}', POINTER]
)
def test_malformed_json_of_every_kind(sharded: Path, tmp_path: Path, content: bytes):
    for name in ("config.json", stored.INDEX, "tokenizer.json", "generation_config.json"):
        directory = Path(shutil.copytree(sharded, tmp_path / name))
        (directory / name).write_bytes(content)
        assert name in refusal(directory)


def test_what_lies_too_deep_is_one_line(model: Path):
    (model / "config.json").write_text("[" * 100_000)
    assert "nested too deeply" in refusal(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 1}, "unexpected tensor model.layers.1."),
        ({"num_hidden_layers": 3}, "tensor model.layers.2."),
        ({"num_hidden_layers": 10**9}, "tensor model.layers.2."),
        ({"vocab_size": 48}, "has shape (40, 16), the configuration says (48, 16)"),
        ({"hidden_size": 32, "head_dim": None}, "embed_tokens.weight has shape"),
        ({"intermediate_size": 25}, "gate_proj.weight has shape"),
        ({"num_key_value_heads": None}, "k_proj.weight has shape"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"hidden_size": 10**400}, "is not a whole number"),
    ],
)
def test_weights_of_another_configuration(model: Path, fields: dict[str, Any], words: str):
    change(model, **fields)
    assert words in refusal(model)


def test_weights_that_are_numbers_of_a_quantized_model(model: Path):
    file = model / "model.safetensors"
    header, data = header_of(file)
    header[FIRST] = {"dtype": "I8", "shape": [40, 16], "data_offsets": [0, 640]}
    shift, rest = 640, 640
    for name in sorted(
        (n for n in header if n not in (FIRST, "__metadata__")), key=lambda n: header[n]["data_offsets"]
    ):
        start, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [rest, rest + stop - start]
        rest += stop - start
    write(file, header, data[:shift] + data[: rest - shift])
    assert "is of type I8, and config.json has no quantization_config" in refusal(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no tokenizer"),
        (b"", "tokenizer.json is empty"),
        (POINTER, "git-lfs pointer"),
        (b'{"model": {"vocab": {}}}', "has no vocabulary"),
        (b'{"model": {"vocab": {"a": "1"}}}', "is no number"),
        (b'{"model": null}', "has no vocabulary"),
        (b'{"model": {"vocab": {"a": 40}}}', "has ids up to 40, the model's vocab_size is 40"),
    ],
)
def test_tokenizers(model: Path, content: bytes | None, words: str):
    if content is None:
        (model / "tokenizer.json").unlink()
    else:
        (model / "tokenizer.json").write_bytes(content)
    assert words in refusal(model)
    model_source.find(model).check(ours=True, tokenizer=False)


def test_pickled_weights(model: Path):
    import torch

    (model / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(100)}, model / "pytorch_model.bin")
    model_source.find(model).check(ours=False)
    assert "is not in safetensors" in refusal(model, ours=True)
    content = (model / "pytorch_model.bin").read_bytes()
    for damaged in (content[: len(content) // 2], b"", POINTER, b"<html>"):
        (model / "pytorch_model.bin").write_bytes(damaged)
        assert "pytorch_model.bin" in refusal(model)


def test_other_architectures(model: Path):
    change(model, model_type="mistral", architectures=["MistralForCausalLM"])
    model_source.find(model).check(ours=False)
    assert "only 'llama' models are supported" in refusal(model, ours=True)
    change(model, intermediate_size=25)
    assert "down_proj.weight has shape" in refusal(model)
    change(model, model_type="gpt2")
    model_source.find(model).check(ours=False)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"],
)
def test_pipes_and_devices_are_not_read(model: Path, name: str):
    """A pipe never answers, and /dev/zero never ends."""
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert "no regular file" in refusal(model) or name == "model.safetensors"
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    assert "no regular file" in refusal(model) or name == "model.safetensors"


def test_nothing_of_it_needs_torch(model: Path):
    code = (
        "import sys; from tinyllama import model_source as m; m.find(sys.argv[1]).check(ours=True);"
        "print(sorted({'torch', 'transformers', 'safetensors', 'vllm', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
