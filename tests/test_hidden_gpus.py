"""The CPU suite finds no GPU, wherever it runs, and holds no test that needs one."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import wants_gpu

from train.accelerators import count_gpus


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("gpu", True), ("gpu or slow", True), ("(gpu)", True), ("not slow and gpu", True), ("", False), ("slow", False),
        ("not slow and not gpu", False), ("not slow and not alone", False), ("not (gpu)", False),
    ],
)  # fmt: skip
def test_only_an_expression_that_asks_for_the_gpu_gets_it(expression, wanted):
    assert wants_gpu(expression) == wanted


def test_this_process_and_its_children_find_no_gpu():
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"]) == ("", "cpu")
    assert not torch.cuda.is_available()
    assert count_gpus() == 0


def test_no_test_of_this_session_needs_a_gpu(request):
    assert not [item.nodeid for item in request.session.items if item.get_closest_marker("gpu")]
