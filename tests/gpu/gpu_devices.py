"""The devices of a test: the CPU, where its body is known to be right, and one GPU, where `-m gpu` asks for it."""

from __future__ import annotations

import pytest

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
each_device = pytest.mark.parametrize("device", ["cpu", GPU])
slow_on_cpu = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])


def relative_error(found, reference) -> float:
    """Of a whole tensor, by its norm."""
    found, reference = found.detach().float().cpu(), reference.detach().float().cpu()
    return ((found - reference).norm() / reference.norm()).item()
