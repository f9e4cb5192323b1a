"""The planner's arithmetic against published numbers and worked vectors, to the digits given."""

from __future__ import annotations

import json
import math

import pytest

from tinyllama import hardware
from tinyllama.errors import ConfigError
from tinyllama.planner.allocation import Allocation, Frontier, break_even_demand, implied_demand
from tinyllama.planner.cost import Costs, dollars_per_million_tokens
from tinyllama.planner.fits import FITS
from tinyllama.planner.prices import Device, find_device, load_prices
from tinyllama.planner.published import PUBLISHED_RUNS
from tinyllama.planner.repeats import Data, effective_tokens, repeat_value, tokens_for_effective

BESIROGLU, SARDANA, MUENNIGHOFF = FITS["besiroglu"], FITS["hoffmann_sardana"], FITS["muennighoff"]


def digits(value: float, shown: str) -> bool:
    """`value`, rounded to as many significant digits as `shown` has, is `shown`."""
    count = len(shown.lower().partition("e")[0].replace(".", "").replace("-", "").lstrip("0"))
    return float(f"{value:.{count - 1}e}") == float(shown)


def loss_of(fit, params):
    return fit.loss(params, fit.optimal_tokens(params))


@pytest.mark.parametrize(
    ("name", "loss", "demand", "params", "tokens", "ratio", "train", "inference", "total", "saved"),
    [
        ("besiroglu", "2.490695", 0, "1.10000e9", "2.47972e10", "22.54", "1.63661e20", "0", "1.63661e20", "0"),
        (
            "besiroglu", "2.490695", 2e12, "3.14894e8", "2.54356e11", "807.75", "4.80571e20", "1.25958e21", "1.74015e21",
            "0.6187",
        ),
        ("hoffmann_sardana", "2.504610", 0, "1.10000e9", "3.07165e10", "27.92", "2.02729e20", "0", "2.02729e20", "0"),
        (
            "hoffmann_sardana", "2.504610", 2e12, "2.83576e8", "3.22454e11", "1137.1", "5.48642e20", "1.13431e21",
            "1.68295e21", "0.6344",
        ),
    ],
)  # fmt: skip
def test_inference_optimal_at_the_loss_of_a_compute_optimal_1b(
    name, loss, demand, params, tokens, ratio, train, inference, total, saved
):
    fit = FITS[name]
    target = loss_of(fit, 1.1e9)
    best = Frontier(fit, demand).for_loss(target)
    reference = Allocation(1.1e9, fit.optimal_tokens(1.1e9), demand)
    assert digits(target, loss)
    assert digits(best.params, params)
    assert digits(best.tokens, tokens)
    assert digits(best.tokens / best.params, ratio)
    assert digits(best.train_flops, train)
    assert digits(best.total_flops, total)
    if demand:
        assert digits(best.inference_flops, inference)
        assert digits(1 - best.total_flops / reference.total_flops, saved)
    else:
        assert best.inference_flops == 0
        assert fit.compute_optimal_for(target) == pytest.approx((best.params, best.tokens), rel=1e-9)


def test_data_limited():
    data = Data(1e11)
    best = Frontier(BESIROGLU, 2e12, data).for_loss(loss_of(BESIROGLU, 1.1e9))
    assert digits(best.params, "3.21319e8")
    assert digits(best.tokens, "2.43161e11")
    assert digits(data.epochs(best.tokens), "2.432")
    assert digits(data.effective_tokens(best.tokens), "2.36703e11")
    assert digits(best.total_flops, "1.75407e21")


def test_repeats():
    effective = effective_tokens(3e12, 0.95e12)
    assert digits(effective, "2.862750e12")
    assert digits(effective / 3e12, "0.95425")
    assert digits(Data(0.95e12).loss(MUENNIGHOFF, 1.1e9, 3e12), "2.266742")
    assert digits(MUENNIGHOFF.loss(1.1e9, 3e12), "2.265757")
    for epochs, value, worth in (
        (4, ".823", ".9314"),
        (8, ".6345", ".8280"),
        (16, ".377", ".6614"),
        (40, ".079", ".3792"),
    ):
        assert digits(repeat_value(epochs), value)
        assert digits(effective_tokens(epochs * 1e9, 1e9) / (epochs * 1e9), worth)
    assert tokens_for_effective(16.3877 * 1e9, 1e9) < math.inf
    assert tokens_for_effective(16.3878 * 1e9, 1e9) == math.inf
    assert tokens_for_effective(effective, 0.95e12) == pytest.approx(3e12, rel=1e-12)


def test_datablations_prints_the_same_losses():
    assert Data(25e9).loss(MUENNIGHOFF, 6.34e9, 242e9) == pytest.approx(2.2256440889984477, abs=5e-16)
    assert Data(25e9).loss(MUENNIGHOFF, 8.67e9, 178e9) == pytest.approx(2.2269634075087867, abs=5e-16)


@pytest.mark.parametrize(
    ("params", "demand", "best", "more_data", "saved"),
    [
        (13e9, 2e12, "6.97e9", "2.165", "0.1745"),
        (30e9, 1e13, "1.361e10", "2.845", "0.2798"),
        (7e9, 1e11, "6.00e9", "1.176", ""),
    ],
)  # fmt: skip
def test_sardana_claims(params, demand, best, more_data, saved):
    tokens = SARDANA.optimal_tokens(params)
    found = Frontier(SARDANA, demand).for_loss(SARDANA.loss(params, tokens))
    reference = Allocation(params, tokens, demand)
    assert digits(found.params, best)
    assert digits(found.tokens / tokens, more_data)
    if saved:
        assert digits(1 - found.total_flops / reference.total_flops, saved)
    if params == 13e9:
        assert digits(reference.total_flops - found.total_flops, "1.6917e22")


@pytest.mark.parametrize(("demand", "params", "saved"), [(2e12, 13e9, "0.101"), (1e13, 30e9, "0.182")])
def test_rounded_exponents_would_plan_otherwise(demand, params, saved):
    fit = FITS["hoffmann_rounded"]
    reference = Allocation(params, fit.optimal_tokens(params), demand)
    found = Frontier(fit, demand).for_loss(fit.loss(reference.params, reference.tokens))
    assert digits(1 - found.total_flops / reference.total_flops, saved)


@pytest.mark.parametrize(
    ("name", "params", "tokens"),
    [
        ("hoffmann_unrounded", "40.4e9", "2.38e12"),
        ("besiroglu", "72.4e9", "1.33e12"),
        ("muennighoff", "70.0e9", "1.37e12"),
    ],
)
def test_gophers_compute(name, params, tokens):
    found = FITS[name].compute_optimal(5.76e23)
    assert digits(found[0], params)
    assert digits(found[1], tokens)


@pytest.mark.parametrize(
    ("name", "break_even", "demand"),
    [("besiroglu", "2.25e12", "4.3e13"), ("hoffmann_sardana", "1.9e12", "2.4e13"), ("muennighoff", "2.2e12", "")],
)
def test_tinyllama_story(name, break_even, demand):
    fit = FITS[name]
    given, loss = Allocation(1.1e9, 3e12), fit.loss(1.1e9, 3e12)
    other = Allocation(*fit.compute_optimal_for(loss))
    assert digits(break_even_demand(given, other), break_even)
    if demand:
        assert digits(implied_demand(fit, 1.1e9, 3e12), demand)
    if name == "besiroglu":
        assert digits(loss, "2.2191")
        assert digits(other.params, "4.85e9")
        assert digits(other.tokens, "1.016e11")
        assert digits(other.train_flops, "2.955e21")
        assert digits(given.train_flops / other.train_flops, "6.7")


def test_dollars_per_million_tokens():
    assert digits(dollars_per_million_tokens(2.50, 7094.5), "0.097885")
    assert digits(dollars_per_million_tokens(1.00, 1000), "0.277778")


def test_gpu_hours_of_published_models_follow_from_their_throughputs():
    assert [(run.name, round(run.gpu_hours)) for run in PUBLISHED_RUNS] == [
        ("TinyLlama-1.1B", 3456),
        ("Pythia-1.0B", 4830),
        ("MPT-1.3B", 7920),
    ]
    assert all(round(run.gpu_hours) == run.readme_gpu_hours for run in PUBLISHED_RUNS)
    # "24k tokens per second per A100" is what TinyLlama's README says of the same run.
    assert round(PUBLISHED_RUNS[0].tokens_per_s, -3) == 24_000


def test_cost_is_sardanas_formula():
    device = Device("D", 2.0, 1e15)
    costs, model = Costs(device, device, 0.5, output_frac=0.25), Allocation(1e9, 2e10, 4e12)
    assert costs.train_dollars(model) == pytest.approx(2.0 / 3600 * 6e9 * 2e10 / (1e15 * 0.5))
    served = 2e9 * (3e12 / (1e15 * 0.5) + 1e12 / (1e15 * 0.01))
    assert costs.inference_dollars(model) == pytest.approx(2.0 / 3600 * served)


def test_every_device_has_a_price():
    prices = load_prices()
    assert [(name, device.peak_flops) for name, device in prices.items()] == [
        (device.name, device.flops_per_s) for device in hardware.DEVICES
    ]


def test_own_prices_lie_over_the_shipped(tmp_path):
    own = tmp_path / "prices.json"
    own.write_text(json.dumps({"h100": 1.99, "MI300X": {"dollars_per_hour": 2, "peak_flops": 1.3e15}}))
    prices = load_prices(own)
    assert prices["H100"] == Device("H100", 1.99, 989e12)
    assert prices["MI300X"].peak_flops == 1.3e15
    assert prices["H200"] == load_prices()["H200"]
    assert len(prices) == len(load_prices()) + 1
    with pytest.raises(ConfigError, match="--device A100 has no price; give one of A100-40G, A100-80G, A100-80G-PCIe"):
        find_device("A100", prices, "--device")
