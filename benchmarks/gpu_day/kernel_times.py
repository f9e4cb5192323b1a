"""Stage 1, times: which attention runs and how fast each is, a compiled block, liger's kernels and the head's loss.

Errors are relative, ||found - exact|| / ||exact||, against the same inputs in float32.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from device_under_test import Processor, find_device
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_day.rows import FAILED, NeedsGpuError
from gpu_day.sizes import Around, Sizes, around
from tinyllama.model.ran import classify
from train import profiling

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BF16_ERROR = 2e-2  # of a chain of a few operations in bf16; a wrong kernel gives 1


def error_of(found: Tensor, exact: Tensor) -> float:
    """Relative, in float64; NaN where anything is."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())


def judged(figure: str, errors: dict[str, float], values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A row's result, failed where an error is too large or not a number."""
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    good = errors[worst] <= BF16_ERROR  # False for NaN
    found = {**values, "errors": errors, "allowed_error": BF16_ERROR, **({} if good else {"status": FAILED})}
    return f"{figure}, error {errors[worst]:.1e} ({worst})", found


def gradients(work: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    out = work(*leaves)
    found = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], upstream.to(out.dtype))
    return [out.detach(), *found]


def forward_and_backward(
    device: Processor, work: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor, repeats: int
) -> tuple[float, float]:
    """Median milliseconds of the forward pass, and of both."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    forward = device.median_ms(lambda: work(*leaves), repeats)
    both = device.median_ms(lambda: torch.autograd.grad(work(*leaves), wanted, upstream), repeats)
    return forward, both


# -- Attention --------------------------------------------------------------------------------------------------------


def attention_inputs(device: Processor, sizes: Sizes) -> tuple[list[Tensor], Tensor]:
    """q (B, H, T, D), k and v (B, K, T, D) in bf16, and a gradient of the output."""
    batch, heads, groups, length, width = sizes.attention
    q = torch.randn(batch, heads, length, width, device=device.torch_device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, groups, length, width, device=q.device, dtype=q.dtype) for _ in range(2))
    return [q, k, v], torch.randn_like(q)


def attention_of(backend: SDPBackend | None, grouped: bool) -> Callable[..., Tensor]:
    """Causal attention by one backend of torch's, or by its own choice. grouped: the kernel shares keys and values."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not grouped:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    if backend is None:
        return attend

    def attend_by(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return attend_by


def attention_row(
    device: Processor, sizes: Sizes, work: Callable[..., Tensor], transposed: bool = False
) -> tuple[str, dict[str, Any]]:
    """Times, TFLOP/s (causal: half of 4 B H T T D), error against float32, and the kernels that really ran."""
    inputs, upstream = attention_inputs(device, sizes)
    batch, heads, _, length, width = sizes.attention
    if transposed:  # ours gives (B, T, H * D)
        upstream = upstream.transpose(1, 2).reshape(batch, length, heads * width)
    small = [t[:1] for t in inputs]
    exact = gradients(
        attention_of(SDPBackend.MATH, True), [t.float() for t in small], torch.ones_like(small[0]).float()
    )
    found = gradients(work, small, torch.ones_like(upstream[:1]))
    if transposed:
        found[0] = found[0].view(1, length, heads, width).transpose(1, 2)
    names = ("output", "q", "k", "v")
    errors = {name: error_of(f, e) for name, f, e in zip(names, found, exact, strict=True)}
    forward, both = forward_and_backward(device, work, inputs, upstream, sizes.repeats)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    found_kernels = profiling.shares(device.profiled(lambda: torch.autograd.grad(work(*leaves), leaves, upstream)))
    ran = classify(row.name for row in found_kernels)
    flops = 2 * batch * heads * length * length * width
    values = {
        "forward_ms": forward,
        "forward_backward_ms": both,
        "forward_flops": flops / (forward / 1000),
        "forward_backward_flops": 3.5 * flops / (both / 1000),
        "ran": ran,
        "kernels": [[row.name, row.total_us / 1000, row.calls] for row in found_kernels[:8]],
        "shape": sizes.attention,
    }
    rate = 3.5 * flops / (both / 1000) / 1e12
    figure = f"{' + '.join(ran) or 'unknown'}: {forward:.2f} ms forward, {both:.2f} with backward, {rate:.0f} TFLOP/s"
    return judged(figure, errors, values)


def torch_choice(device: Processor, sizes: Sizes) -> tuple[str, dict[str, Any]]:
    """The backend that torch takes by itself for our shape, and its order of preference."""
    (q, k, v), _ = attention_inputs(device, sizes)
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=True))
    order = [SDPBackend(n).name for n in torch._C._get_sdp_priority_order()]
    return chosen.name, {"chosen": chosen.name, "order": order}


def backend_row(device: Processor, sizes: Sizes, name: str) -> tuple[str, dict[str, Any]]:
    """One of torch's backends; efficient attention has no groups, so its keys and values are repeated."""
    if device.needs_gpu and name != "flash":
        raise NeedsGpuError(device.needs_gpu)
    return attention_row(device, sizes, attention_of(BACKENDS[name], name != "efficient"))


def our_attention(device: Processor, sizes: Sizes) -> tuple[str, dict[str, Any]]:
    """What a training run of ours chooses."""
    from tinyllama.model.kernels import Setting, choose

    kernels, choices = choose({}, Setting(device.torch_device, True))
    figure, values = attention_row(device, sizes, kernels.attention, transposed=True)
    table = {choice.operation: [choice.kernel, choice.why] for choice in choices}
    return f"{table['attention'][0]}, ran {figure}", {**values, "choices": table}


# -- A block, liger's kernels, the loss ----------------------------------------------------------------------------------


def block_row(device: Processor, sizes: Sizes, compiled: bool) -> tuple[str, dict[str, Any]]:
    """One layer in bf16 with the kernels that a run chooses, against the same layer in float32 by plain torch."""
    from step_rows import on_device

    from tinyllama.model.kernels import Setting, choose
    from tinyllama.model.llama import rotary_tables

    config = dataclasses.replace(sizes.model, num_hidden_layers=1)
    exact_model = on_device(config, device.torch_device)
    model = copy.deepcopy(exact_model).bfloat16()
    model.use(choose({}, Setting(device.torch_device, compiled))[0])
    if compiled:
        model.compile_blocks()
    block, exact_block = model.model.layers[0], exact_model.model.layers[0]
    x = torch.randn(sizes.micro, sizes.sequence_length, config.hidden_size, device=device.torch_device)
    upstream = torch.randn_like(x)
    cos, sin = rotary_tables(torch.arange(x.shape[1], device=x.device).unsqueeze(0), config.head_dim, config.rope_theta)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def ours(given: Tensor) -> Tensor:
        return block(given, cos.bfloat16(), sin.bfloat16())

    pairs = zip(
        gradients(ours, [x.bfloat16()], upstream),
        gradients(lambda given: exact_block(given, cos, sin), [x], upstream),
        strict=True,
    )
    errors = {name: error_of(found, exact) for name, (found, exact) in zip(("output", "input"), pairs, strict=True)}
    forward, both = forward_and_backward(device, ours, [x.bfloat16()], upstream.bfloat16(), sizes.repeats)
    return judged(
        f"{forward:.2f} ms forward, {both:.2f} with backward",
        errors,
        {"forward_ms": forward, "forward_backward_ms": both},
    )


def liger_row(device: Processor, sizes: Sizes, operation: str) -> tuple[str, dict[str, Any]]:
    """One of liger's kernels in bf16 against plain torch in float32, values and gradients, and both times in bf16."""
    if device.needs_gpu:
        raise NeedsGpuError(device.needs_gpu)
    from tinyllama.model.kernels import PLAIN, Setting, choose
    from tinyllama.model.llama import rotary_tables

    model, shape = sizes.model, (sizes.micro, sizes.sequence_length)
    kernels, _ = choose({operation: "liger"}, Setting(device.torch_device))
    function, plain = getattr(kernels, operation), getattr(PLAIN, operation)

    def drawn(*dims: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*dims, device=device.torch_device, dtype=torch.bfloat16) * scale

    if operation == "norm":
        inputs = [drawn(*shape, model.hidden_size), 1 + drawn(model.hidden_size, scale=0.1)]
        call = lambda f, *given: f(*given, model.rms_norm_eps)  # noqa: E731
    elif operation == "rotary":
        inputs = [drawn(shape[0], n, shape[1], model.head_dim) for n in sizes.attention[1:3]]
        tables = rotary_tables(torch.arange(shape[1], device=inputs[0].device)[None], model.head_dim, model.rope_theta)
        call = lambda f, *given: torch.cat(f(*given, *(t[:, None].to(given[0].dtype) for t in tables)), 1)  # noqa: E731
    elif operation == "swiglu":
        inputs = [drawn(*shape, 2 * model.intermediate_size)]
        call = lambda f, gate_up: f(gate_up.clone())  # noqa: E731 - the kernel may write into what it is given
    else:
        tokens = shape[0] * shape[1]
        inputs = [drawn(tokens, model.hidden_size), drawn(model.vocab_size, model.hidden_size, scale=0.02)]
        targets = torch.randint(0, model.vocab_size, (tokens,), device=device.torch_device)
        call = lambda f, *given: f(*given, targets)  # noqa: E731
    work, reference = functools.partial(call, function), functools.partial(call, plain)
    upstream = torch.randn_like(work(*inputs).float())
    exact = gradients(reference, [t.float() for t in inputs], upstream)
    found = gradients(work, inputs, upstream)
    names = ("output", *(f"gradient {n}" for n in range(len(inputs))))
    errors = {name: error_of(f, e) for name, f, e in zip(names, found, exact, strict=True)}
    times = [
        forward_and_backward(device, f, inputs, upstream.to(found[0].dtype), sizes.repeats)[1]
        for f in (work, reference)
    ]
    return judged(
        f"{times[0]:.2f} ms both passes, plain torch {times[1]:.2f}",
        errors,
        {"forward_backward_ms": times[0], "plain_forward_backward_ms": times[1]},
    )


def loss_row(device: Processor, sizes: Sizes) -> tuple[str, dict[str, Any]]:
    """The head and its loss as a training run of ours has it: time, peak memory, and error against float32."""
    from tinyllama.model.kernels import Setting, choose

    model, tokens = sizes.model, sizes.micro * sizes.sequence_length
    loss = choose({}, Setting(device.torch_device, True))[0].loss
    hidden = torch.randn(tokens, model.hidden_size, device=device.torch_device, dtype=torch.bfloat16)
    weight = torch.randn(model.vocab_size, model.hidden_size, device=hidden.device, dtype=hidden.dtype) * 0.02
    targets = torch.randint(0, model.vocab_size, (tokens,), device=hidden.device)
    one = torch.ones((), device=hidden.device)
    exact = gradients(
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum"),
        [hidden.float(), weight.float()],
        one,
    )
    found = gradients(lambda h, w: loss(h, w, targets), [hidden, weight], one)
    errors = {n: error_of(f, e) for n, f, e in zip(("loss", "hidden", "weight"), found, exact, strict=True)}
    exact = found = []
    device.empty_cache()
    device.reset_peak()
    _, both = forward_and_backward(
        device, lambda h, w: loss(h, w, targets), [hidden, weight], one, sizes.repeats // 2 + 1
    )
    rate = 6 * tokens * model.hidden_size * model.vocab_size / (both / 1000)
    return judged(
        f"{both:.2f} ms both passes, {rate / 1e12:.0f} TFLOP/s",
        errors,
        {"forward_backward_ms": both, "flops": rate, "peak_bytes": device.peak_bytes(), "tokens": tokens},
    )


def main() -> None:
    here: Around = around()
    device, sizes = find_device(), here.sizes
    torch.manual_seed(1)
    measure = here.rows.measure
    measure("attention: torch's choice", lambda: torch_choice(device, sizes))
    for name in BACKENDS:
        measure(f"attention: {name}", lambda name=name: backend_row(device, sizes, name))
    measure("attention: ours", lambda: our_attention(device, sizes))
    for operation in ("norm", "rotary", "swiglu", "loss"):
        measure(f"liger {operation}, bf16", lambda operation=operation: liger_row(device, sizes, operation))
    measure("block, eager", lambda: block_row(device, sizes, False))
    measure("block, compiled", lambda: block_row(device, sizes, True))
    measure("head and loss", lambda: loss_row(device, sizes))


if __name__ == "__main__":
    main()
