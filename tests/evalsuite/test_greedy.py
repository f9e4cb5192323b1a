"""The most likely token, screened in bfloat16: the choice must be that of the full logits, whatever the weights."""

import pytest
import torch

from evalsuite.greedy import GreedyHead, fast_bfloat16
from tinyllama.errors import UserError

needs_bfloat16 = pytest.mark.skipif(not fast_bfloat16(), reason="this processor has no bfloat16 products")


def screening(weight: torch.Tensor) -> GreedyHead:
    head = GreedyHead(weight)
    assert head.screens
    return head


@needs_bfloat16
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize(("vocab", "width", "rows"), [(32000, 64, 33), (5000, 384, 7), (4096, 16, 1)])
def test_choices_are_those_of_all_logits(scale, vocab, width, rows):
    generator = torch.Generator().manual_seed(vocab)
    weight = torch.randn(vocab, width, generator=generator) * torch.rand(vocab, 1, generator=generator)
    hidden = torch.randn(rows, width, generator=generator) * scale
    head = screening(weight)
    expected = (hidden.double() @ weight.double().t()).argmax(-1)
    assert head(hidden) == expected.tolist()
    assert 1 <= head.num_candidates / head.num_screened < vocab / 64


@needs_bfloat16
def test_what_bfloat16_cannot_tell_apart_is_told_apart():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 32, generator=generator)
    hidden = torch.randn(20, 32, generator=generator)
    # Twenty copies of each row's own direction, differences far below bfloat16's: the last of them is the largest.
    for row in range(20):
        direction = hidden[row] / hidden[row].norm()
        for copy in range(20):
            weight[row * 20 + copy] = direction * (9 + copy * 1e-5)
    found = screening(weight)(hidden)
    assert found == (hidden.double() @ weight.double().t()).argmax(-1).tolist()
    assert {token % 20 for token in found} == {19}


@needs_bfloat16
def test_equal_logits_give_the_first_and_a_crowd_is_computed_in_full():
    head = screening(torch.ones(4096, 8))
    assert head(torch.ones(3, 8)) == [0, 0, 0]
    twice = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    twice[2048:] = twice[:2048]
    assert max(screening(twice)(torch.randn(50, 8))) < 2048


@needs_bfloat16
def test_all_logits_negative():
    weight = -torch.rand(3000, 16, generator=torch.Generator().manual_seed(2)) - 1
    hidden = torch.rand(9, 16, generator=torch.Generator().manual_seed(3)) + 0.5
    assert screening(weight)(hidden) == (hidden.double() @ weight.double().t()).argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_is_an_error(dtype):
    weight = torch.randn(500, 8).to(dtype)
    hidden = torch.randn(2, 8).to(dtype)
    hidden[1, 3] = float("nan")
    with pytest.raises(UserError, match="not numbers"):
        GreedyHead(weight)(hidden)
    weight[7] = float("inf")
    with pytest.raises(UserError, match="not numbers"):
        GreedyHead(weight)(hidden.nan_to_num(1.0))
    weight[7] = 0.0
    weight[3, 0] = -float("inf")  # with these rows, logits of -inf: no choice is lost, but the weights are not numbers
    with pytest.raises(UserError, match="not numbers"):
        GreedyHead(weight)(torch.full((2, 8), -1.0).to(dtype))
    weight[7] = float("nan")
    with pytest.raises(UserError, match="not numbers"):
        GreedyHead(weight)(hidden.nan_to_num(1.0))


def test_other_types_take_the_largest_of_all_logits():
    weight = torch.randn(500, 8).bfloat16()
    head = GreedyHead(weight)
    assert not head.screens
    hidden = torch.randn(4, 8).bfloat16()
    assert head(hidden) == torch.nn.functional.linear(hidden, weight).float().argmax(-1).tolist()


@needs_bfloat16
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 130, 200])
def test_every_token_of_a_vocabulary_of_any_size_can_win(vocab):
    weight = torch.eye(vocab)
    assert screening(weight)(3 * weight) == list(range(vocab))
