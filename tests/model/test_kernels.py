"""Every kernel against an fp32 reference, values and gradients; and the choice between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tinyllama.errors import ConfigError
from tinyllama.model import ops
from tinyllama.model.config import ModelConfig
from tinyllama.model.kernels import PLAIN, TABLE, Choice, Machine, Setting, choose, confirm, decide, what_ran, within
from tinyllama.model.llama import Llama
from tinyllama.model.ops import IGNORE_INDEX
from tinyllama.model.ran import classify
from train.ranges import KERNELS

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH, VOCABULARY = 2, 200, 6, 2, 64, 501  # 200 positions: one and a half blocks
DEVICES = ["cpu"]  # GPUs are hidden from this suite; tests/gpu has the kernels on one
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # of the whole tensor's norm


def reference_attention(q, k, v):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def reference_rotary(q, k, cos, sin):
    """As complex numbers: the pair (i, i + D/2) is turned by one angle."""

    def turn(x):
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[..., :half]
        return torch.cat((turned.real, turned.imag), -1)

    return turn(q), turn(k)


def reference_swiglu(gate_up):
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def reference_loss(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


REFERENCES: dict[str, Callable] = {
    "attention": reference_attention,
    "norm": reference_norm,
    "rotary": reference_rotary,
    "swiglu": reference_swiglu,
    "loss": reference_loss,
}


def inputs(operation: str) -> list:
    """fp32 inputs as the model makes them; heads are views of (B, T, H * D)."""
    torch.manual_seed(0)

    def heads(number: int) -> torch.Tensor:
        return torch.randn(BATCH, LENGTH, number * WIDTH).view(BATCH, LENGTH, number, WIDTH).transpose(1, 2)

    if operation == "attention":
        return [heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)]
    if operation == "norm":
        return [torch.randn(BATCH, LENGTH, 96) * 3, torch.rand(96) + 0.5, 1e-5]
    if operation == "rotary":
        angles = torch.arange(LENGTH)[:, None] / 100 ** (torch.arange(WIDTH // 2) / WIDTH)
        angles = torch.cat((angles, angles), 1)[None, None]  # (1, 1, T, D)
        return [heads(HEADS), heads(KV_HEADS), angles.cos(), angles.sin()]
    if operation == "swiglu":
        return [torch.randn(BATCH, LENGTH, 2 * 176)]
    targets = torch.randint(0, VOCABULARY, (BATCH * LENGTH,))
    targets[:30] = IGNORE_INDEX
    targets[-1] = IGNORE_INDEX
    return [torch.randn(BATCH * LENGTH, 96), torch.randn(VOCABULARY, 96) * 0.2, targets]


def of_one_product(operation: str, given: list) -> list:
    """The same inputs as a fused projection leaves them: q, k and v are views of one tensor."""

    def split(parts: list) -> list:
        return list(torch.cat(parts, -1).split([part.shape[-1] for part in parts], -1))

    number = {"attention": 3, "rotary": 2}[operation]
    flat = [x.transpose(1, 2).flatten(2) for x in given[:number]]
    heads = [x.unflatten(2, (-1, WIDTH)).transpose(1, 2) for x in split([*flat, flat[-1]])[:number]]
    return [*heads, *given[number:]]


def values_and_gradients(function: Callable, arguments: list, differentiable: int) -> list[torch.Tensor]:
    leaves = [a.detach().requires_grad_(i < differentiable) if torch.is_tensor(a) and a.is_floating_point() else a
              for i, a in enumerate(arguments)]  # fmt: skip
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    directions = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in outputs]
    torch.autograd.backward(outputs, directions)
    return [o.detach().float().cpu() for o in outputs] + [leaf.grad.float().cpu() for leaf in leaves[:differentiable]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("operation", "name"), [(o, n) for o, names in TABLE.items() for n in names])
def test_a_kernel_equals_its_fp32_reference_in_value_and_gradient(operation, name, dtype, device):
    setting = Setting(torch.device(device))
    if reason := TABLE[operation][name].missing(setting):
        pytest.skip(f"{name}: {reason}")
    if dtype == torch.float32 and (name.startswith("flash") or name == "cudnn"):
        pytest.skip(f"{name} computes in 16 bits only")
    differentiable = {"attention": 3, "norm": 2, "rotary": 2, "swiglu": 1, "loss": 2}[operation]
    given = inputs(operation)
    expected = values_and_gradients(REFERENCES[operation], given, differentiable)
    cast = [a.to(device, dtype if a.is_floating_point() else a.dtype) if torch.is_tensor(a) else a for a in given]
    found = values_and_gradients(TABLE[operation][name].build(setting), cast, differentiable)
    for mine, reference in zip(found, expected, strict=True):
        assert ((mine - reference).norm() / reference.norm()).item() < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("operation", "name"), [(o, n) for o in ("attention", "rotary") for n in TABLE[o] if n != "flex"]
)
def test_a_kernel_takes_views_of_one_fused_product(operation, name, device):
    setting = Setting(torch.device(device))
    if reason := TABLE[operation][name].missing(setting):
        pytest.skip(f"{name}: {reason}")
    differentiable = {"attention": 3, "rotary": 2}[operation]
    given = inputs(operation)
    expected = values_and_gradients(REFERENCES[operation], given, differentiable)
    fused = of_one_product(operation, [a.to(device, torch.bfloat16) for a in given])
    assert not any(x.is_contiguous() for x in fused[:differentiable])
    found = values_and_gradients(TABLE[operation][name].build(setting), fused, differentiable)
    for mine, reference in zip(found, expected, strict=True):
        assert ((mine - reference).norm() / reference.norm()).item() < RELATIVE_ERROR[torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_product_is_added_into_an_fp32_total_without_a_rounding_of_the_sum(dtype, device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator).to(dtype) for n in (96, 48))
    total = torch.randn(96, 48, generator=generator) * 1000
    expected = total.double() + a.double() @ b.t().double()
    found = total.to(device)
    ops.accumulate_(found, a.t().contiguous().t().to(device), b.t().to(device))
    # bf16 on a CPU rounds the product (8 bits) before the sum; a GPU and fp32 do not.
    allowed = 0.2 if (dtype, device) == (torch.bfloat16, "cpu") else 5e-4
    assert (found.cpu().double() - expected).abs().max() < allowed


def test_a_chunk_of_the_loss_fits_the_device():
    assert ops.loss_chunk_tokens(32_000, "cpu") == 1024
    assert ops.loss_chunk_tokens(32_000, "cuda") == 8192
    assert ops.loss_chunk_tokens(128_256, "cuda") == 2048
    for vocabulary in (300, 32_000, 50_304, 128_256):
        chunk = ops.loss_chunk_tokens(vocabulary, "cuda")
        assert chunk & (chunk - 1) == 0
        assert 1024 <= chunk <= 16384
        assert chunk * vocabulary * 4 <= ops.LOSS_BYTES
        assert chunk == 16384 or chunk * vocabulary * 8 > ops.LOSS_BYTES


@pytest.mark.parametrize("device", DEVICES)
def test_the_compiled_loss_equals_its_fp32_reference_in_value_and_gradient(device):
    expected = values_and_gradients(reference_loss, inputs("loss"), 2)
    kernels, _ = choose({"loss": "chunked"}, Setting(torch.device(device), compiled=True))
    given = [x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype) for x in inputs("loss")]
    for mine, reference in zip(values_and_gradients(kernels.loss, given, 2), expected, strict=True):
        assert ((mine - reference).norm() / reference.norm()).item() < RELATIVE_ERROR[torch.bfloat16]


def test_a_second_backward_pass_of_the_loss_gives_the_same_gradients():
    hidden, weight, targets = inputs("loss")
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    loss = ops.chunked_loss(hidden, weight, targets) / 7
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chunk_tokens", [7, 64, 10_000])
def test_the_loss_does_not_depend_on_its_chunks(chunk_tokens):
    hidden, weight, targets = inputs("loss")
    expected = values_and_gradients(reference_loss, [hidden, weight, targets], 2)

    def loss(hidden, weight, targets):
        return (
            ops.chunked_loss(hidden, weight, targets, chunk_tokens=chunk_tokens) / 3
        )  # a factor reaches the gradients

    found = values_and_gradients(loss, [hidden, weight, targets], 2)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine * 3, reference, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ops.chunked_loss(hidden, weight, targets, chunk_tokens=chunk_tokens), expected[0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_blocked_attention_keeps_the_probabilities_of_half_the_square_in_the_dtype_of_its_inputs(compiled):
    attention = torch.compile(ops.blocked_attention, dynamic=False) if compiled else ops.blocked_attention
    inputs = [torch.randn(1, heads, 512, 32).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(*inputs)
    probabilities = 4 * 512 * 512 * 5 // 8 * 2  # blocks of 128, 256, 384 and 512 keys
    of_inputs_and_output = 2 * (4 + 2 + 2 + 4) * 512 * 32
    assert probabilities <= sum(kept.values()) <= probabilities + of_inputs_and_output


def test_compiled_blocks_give_the_loss_and_gradients_of_plain_torch():
    config = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 512, (2, 161), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        model = Llama(config)
        model.initialize(1)
        if compiled:
            kernels, choices = choose({}, Setting(torch.device("cpu"), compiled=True))
            assert {c.operation: c.kernel for c in choices}["attention"] == "blocked"
            model.use(kernels)
            model.compile_blocks()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def test_the_recipe_knows_every_kernel_by_name():
    assert {operation: set(names) for operation, names in KERNELS.items()} == {o: set(k) for o, k in TABLE.items()}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("compiled", "attention"), [(False, "sdpa"), (True, "blocked")])
def test_on_a_cpu_the_choice_follows_the_compiler(compiled, attention, documents):
    _, choices = choose({}, Setting(torch.device("cpu"), compiled, documents))
    assert {c.operation: c.kernel for c in choices} == {
        "attention": attention, "norm": "torch", "rotary": "torch", "swiglu": "torch", "loss": "chunked",
    }  # fmt: skip
    assert all(c.why for c in choices)


FLASH_2, FLASH_3, FLASH_4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"
ALL = frozenset({FLASH_2, FLASH_3, FLASH_4, "liger_kernel", "triton"})
BARE = frozenset({"triton"})


@pytest.mark.parametrize(
    ("capability", "torch_version", "cudnn", "modules", "attention"),
    [
        ((9, 0), (2, 11), 91900, BARE, "cudnn"),
        ((9, 0), (2, 11), 91900, BARE | {FLASH_2}, "cudnn"),
        ((9, 0), (2, 13), 92300, ALL, "flash-attn-3"),
        ((9, 0), (2, 11), 91501, BARE, "cudnn"),
        ((9, 0), (2, 11), 91500, BARE, "sdpa"),  # an older cuDNN, as one on LD_LIBRARY_PATH may be
        ((9, 0), (2, 11), 91002, BARE | {FLASH_2}, "flash-attn-2"),
        ((9, 0), (2, 11), None, BARE | {FLASH_2}, "flash-attn-2"),
        ((9, 0), (2, 10), 91900, BARE | {FLASH_3}, "sdpa"),
        ((8, 0), (2, 11), 91900, BARE, "sdpa"),
        ((8, 0), (2, 11), 91900, ALL, "flash-attn-2"),
        ((8, 9), (2, 11), 91900, BARE | {FLASH_2}, "flash-attn-2"),
        ((10, 0), (2, 11), 91900, ALL, "flash-attn-4"),
        ((10, 0), (2, 11), 91900, BARE | {FLASH_2}, "cudnn"),
        ((10, 3), (2, 11), 91900, BARE, "cudnn"),
        ((12, 0), (2, 11), 91900, ALL, "flash-attn-2"),
        ((12, 0), (2, 11), 91900, BARE, "sdpa"),
        ((7, 5), (2, 11), 91900, ALL, "sdpa"),
    ],
)  # fmt: skip
def test_on_a_gpu_attention_is_the_fastest_of_the_card(capability, torch_version, cudnn, modules, attention):
    machine = Machine("cuda", capability, torch_version, cudnn, modules)
    for compiled in (False, True):
        setting = Setting(torch.device("cuda"), compiled, on=machine)
        table = {c.operation: c for c in decide({}, setting)}
        assert table["attention"].kernel == attention
        liger = "liger_kernel" in modules and capability >= (8, 0) and not compiled
        assert table["norm"].kernel == ("liger" if liger else "torch")
        assert table["loss"].kernel == ("liger" if liger else "chunked")
        kept_away = compiled and "liger_kernel" in modules and capability >= (8, 0)
        assert (".item()" in table["loss"].why) == kept_away
    exact = dataclasses.replace(setting, low_precision=False)
    assert {c.operation: c.kernel for c in decide({}, exact)}["attention"] == "sdpa"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_a_deterministic_run_takes_attention_with_a_deterministic_backward_pass_alone(capability):
    def attention(modules, documents=False):
        machine = Machine("cuda", capability, (2, 11), 91900, modules)
        setting = Setting(torch.device("cuda"), True, documents, deterministic=True, on=machine)
        for name in ("cudnn", "flash-attn-3", "flash-attn-4"):
            with pytest.raises(ConfigError):
                decide({"attention": name}, setting)
        return {c.operation: c.kernel for c in decide({}, setting)}["attention"]

    assert attention(ALL) == "flash-attn-2"
    assert attention(BARE) == "sdpa"
    assert attention(ALL, documents=True) == "flex"


def test_documents_on_a_gpu_are_a_block_sparse_kernel():
    machine = Machine("cuda", (9, 0), (2, 11), 91900, ALL)
    setting = Setting(torch.device("cuda"), True, documents=True, on=machine)
    assert {c.operation: c.kernel for c in decide({}, setting)}["attention"] == "flex"
    without = dataclasses.replace(setting, on=dataclasses.replace(machine, modules=frozenset()))
    assert {c.operation: c.kernel for c in decide({}, without)}["attention"] == "sdpa"
    with pytest.raises(ConfigError, match=r"knows documents; here: flex, blocked, sdpa"):
        decide({"attention": "cudnn"}, setting)
    with pytest.raises(ConfigError, match=r"it is for data\.document_masking"):
        decide({"attention": "flex"}, dataclasses.replace(setting, documents=False))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # as profilers printed them, on H100, A100 and B200
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "cudnn"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0", "cudnn"),
        ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_3_64x64x128_4x1x1_kernel0_0", "cudnn"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>", "flash"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>", "flash"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<(int)64, (int)64>>", "flash"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false>>", "flash-attn-2"),
        ("void flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64>>", "flash-attn-2"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Coll", "flash-attn-3"),
        (
            "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::CollectiveMain",
            "flash-attn-3",
        ),
        (
            "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm100FlashAttentionForwardSm100_object_at__ten",
            "flash-attn-4",
        ),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass", "efficient"),
        ("fmha_cutlassB_bf16_aligned_128x128_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel", "efficient"),
        ("triton_tem_fused_flex_attention_split_transpose_0", "flex"),
        ("aten::_scaled_dot_product_cudnn_attention", "cudnn"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "cpu flash"),
        ("aten::_scaled_dot_product_attention_math", "math"),
        ("flash_attn::_flash_attn_forward", "flash-attn-2"),
    ],
)
def test_an_attention_is_known_by_the_names_of_its_kernels(name, kind):
    others = ["ampere_bf16_s1688gemm_bf16_128x128_ldg8_f2f_stages_32x1_tn", "aten::mm", "nvjet_tst_128x256_64x6"]
    assert classify([*others, name]) == [kind]
    assert classify([*others, "aten::scaled_dot_product_attention"]) == []


def test_a_kernel_tells_more_than_the_operator_around_it():
    """flash-attn 3 and 4 are registered under the name of torch's own flash operator."""
    names = ["aten::_scaled_dot_product_flash_attention", "cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::Co"]
    assert classify(names) == ["flash-attn-3"]
    assert classify(["aten::_cudnn_attention_forward", "aten::_scaled_dot_product_attention_math"]) == ["cudnn", "math"]


def test_what_ran_is_read_off_a_real_pass():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    arguments = [x.requires_grad_() for x in inputs("attention")]
    assert what_ran(PLAIN.attention, *arguments) == ["cpu flash"]
    with sdpa_kernel(SDPBackend.MATH):
        assert what_ran(PLAIN.attention, *arguments) == ["math"]
    assert what_ran(ops.blocked_attention, *arguments) == []


def test_the_table_says_what_ran_and_warns_of_another():
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for documents in (False, True):
        setting = Setting(torch.device("cpu"), documents=documents)
        kernels, choices = choose({}, setting)
        state = torch.get_rng_state()
        told, doubts = confirm(kernels, choices, setting, config, 96)
        assert torch.equal(state, torch.get_rng_state())
        assert told[0].ran == "cpu flash"  # which takes a mask too
        assert told[1:] == choices[1:]
        assert doubts == []
    shadowed = [Choice("attention", "cudnn", "as the recipe says")]
    _, doubts = confirm(kernels, shadowed, Setting(torch.device("cpu")), config, 96)
    assert len(doubts) == 1
    assert "cudnn was chosen, and what ran is: cpu flash" in doubts[0]

    def refuses(q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.\nMore")

    with pytest.raises(ConfigError, match=r"'cudnn' does not run here: No available kernel\. Aborting execution\."):
        confirm(dataclasses.replace(PLAIN, attention=refuses), shadowed, Setting(torch.device("cpu")), config, 96)


@pytest.mark.parametrize(
    ("operation", "name", "what"),
    [
        ("attention", "flash-attn-2", r"pip install 'tinyllama\[flash2\]' --no-build-isolation"),
        ("attention", "flash-attn-4", r"pip install 'tinyllama\[flash4\]'"),
        ("attention", "flash-attn-3", "build it from"),
        ("norm", "liger", r"pip install 'tinyllama\[gpu\]'"),
    ],
)
def test_a_kernel_that_is_not_installed_names_what_brings_it(operation, name, what):
    machine = Machine("cuda", (9, 0), (2, 11), 91900, BARE)
    with pytest.raises(ConfigError, match=f"is not installed; {what}"):
        decide({operation: name}, Setting(torch.device("cuda"), on=machine))


@pytest.mark.parametrize("operation", list(TABLE))
def test_a_kernel_that_cannot_be_used_is_an_error_and_not_another_one(operation):
    name = next(iter(TABLE[operation]))
    with pytest.raises(ConfigError, match=rf"training.kernels.{operation}='{name}': it needs a GPU; here: "):
        choose({operation: name}, Setting(torch.device("cpu")))


@pytest.mark.parametrize(("backend", "fused"), [("FLASH_ATTENTION", True), ("MATH", False)])
def test_a_backend_of_torch_is_named_in_the_compiled_graph_and_breaks_none(backend, fused):
    from torch._dynamo.backends.common import aot_autograd

    operators: list[str] = []

    def keep(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(within(backend), backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=False)
    compiled(*[x.requires_grad_() for x in inputs("attention")]).sum().backward()
    flash = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert any(name.startswith(flash) for name in operators) == fused
    assert any(name.startswith(f"{flash}_backward") for name in operators) == fused
    assert any(name.startswith("aten.bmm") for name in operators) != fused
