"""Log-likelihoods by shared prefixes against transformers' logits, in fp32 and bf16; and a pass that memory cannot hold."""

from __future__ import annotations

import pytest
import torch
from gpu_devices import each_device, on_gpu

from evalsuite.scoring import Budget, Continuation, Work, log_likelihoods
from tinyllama.model.config import ModelConfig
from tinyllama.model.llama import Llama

CONFIG = ModelConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.08,
)  # fmt: skip


def models(device: str, dtype: torch.dtype):
    """Ours, and transformers' in fp32 with the same (rounded) weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = Llama(CONFIG)
    ours.initialize(3)
    ours = ours.to(device, dtype).eval()
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf())).eval()
    theirs.load_state_dict({name: tensor.float().cpu() for name, tensor in ours.state_dict().items()})
    return ours, theirs.to(device)


def multiple_choice(contexts: int, length: int, choices: int = 4) -> list[Continuation]:
    """Contexts that share a beginning, and for each some continuations of 1 to 6 tokens."""
    draw = torch.Generator().manual_seed(1)

    def tokens(number: int) -> list[int]:
        return torch.randint(3, CONFIG.vocab_size, (number,), generator=draw).tolist()

    shared, wanted = tokens(40), []
    for number in range(contexts):
        context = [1, *shared, *tokens(length + 5 * number)]
        for choice in range(choices):
            targets = tokens(1 + (number + choice) % 6)
            wanted.append(Continuation([*context, *targets][:-1], targets))
    return wanted


@torch.no_grad()
def by_transformers(model, wanted: list[Continuation], device: str) -> list[tuple[float, bool]]:
    found = []
    for request in wanted:
        logits = model(torch.tensor([request.read], device=device)).logits[0, -len(request.targets) :]
        targets = torch.tensor(request.targets, device=device)
        chosen = logits.float().log_softmax(-1).gather(1, targets[:, None])
        found.append((chosen.sum().item(), bool((logits.argmax(-1) == targets).all())))
    return found


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_log_likelihoods_are_transformers(dtype, device):
    """fp32: up to the order of sums. bf16: no further from fp32 than twice what transformers' own bf16 is."""
    ours, theirs = models(device, dtype)
    wanted = multiple_choice(contexts=12, length=30)
    found = log_likelihoods(ours, wanted, Budget(256, 8), Work())
    exact = by_transformers(theirs, wanted, device)
    errors = [abs(mine[0] - reference[0]) for mine, reference in zip(found, exact, strict=True)]
    if dtype == torch.float32:
        assert max(errors) < 2e-4 * max(abs(score) for score, _ in exact)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in exact]
        return
    low = by_transformers(theirs.to(dtype), wanted, device)
    of_theirs = [abs(mine[0] - reference[0]) for mine, reference in zip(low, exact, strict=True)]
    assert sum(errors) < 2 * sum(of_theirs), (sum(errors), sum(of_theirs))
    assert max(errors) < 3 * max(of_theirs), (max(errors), max(of_theirs))


@on_gpu
def test_out_of_memory_halves_the_passes_and_changes_no_score(device):
    """The allocator's own error: this process may take 256 MiB more than it has, a pass of 65,536 tokens needs 540."""
    ours, _ = models(device, torch.float32)
    wanted = [
        Continuation(torch.randint(3, 2048, (256,), generator=torch.Generator().manual_seed(n)).tolist(), [5, 7])
        for n in range(256)
    ]
    expected = log_likelihoods(ours, wanted, Budget(2048, 8), Work())
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 256 * 2**20
    budget = Budget(65_536, 64)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        found = log_likelihoods(ours, wanted, budget, Work())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 64 <= budget.tokens < 65_536
    for mine, other in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=2e-3)
