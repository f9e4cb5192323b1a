"""What a report computes: words for numbers, short curves of long ones, colours that can be told apart, devices' prices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tinyllama.report import metrics, numbers, pareto
from tinyllama.report.palette import DARK, LIGHT, SERIES, contrast


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("AMD EPYC 7B13", None),
    ],
)
def test_devices_are_found_in_the_price_table(name, known):
    from tinyllama.planner.prices import load_prices

    found = pareto.find_price(name, load_prices())
    assert (found.name if found else None) == known


def test_runs_are_told_apart_without_colour():
    """No two of the first 36 share colour and line style, no two neighbours either of them."""
    from tinyllama.report.drawing import dash, series_color

    looks = [(series_color(number), str(dash(number))) for number in range(36)]
    assert len(set(looks)) == 36
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(looks[:6]))


def test_colours_stand_out_from_the_paper():
    """WCAG 2.2: 4.5 for text, 3 for lines."""
    for theme in (LIGHT, DARK):
        for name in ("ink", "soft", "accent", "muted", "alarm"):
            assert contrast(theme[name], theme["paper"]) >= 4.5, name
        for number in range(SERIES):
            assert contrast(theme[f"s{number}"], theme["paper"]) >= 4.5
        assert contrast(theme["soft"], theme["panel"]) >= 4.5


def test_numbers_as_words():
    assert [numbers.compact(v) for v in (3e12, 1.007e12, 999_900, 1_638_400, 4096, 12)] == [
        "3T", "1.01T", "1M", "1.64M", "4.1k", "12",
    ]  # fmt: skip
    assert [numbers.plain(v) for v in (1285.4, 12.34567, 0.01234567, 9.0)] == ["1,285", "12.35", "0.01235", "9"]
    assert numbers.listed([str(n) for n in range(8)], ", ") == "0, 1, 2, 3, 4, 5, 6, 7"
    assert numbers.listed([str(n) for n in range(9)], ", ") == "0, 1, 2, 3, 4, 5, and 3 more, in the data below"
    assert [numbers.dollars(v) for v in (0.0979, 1.25, 12_400)] == ["$0.0979", "$1.25", "$12.4k"]


def test_downsampling_keeps_every_spike_and_gap():
    values = np.random.default_rng(0).normal(2.0, 0.1, 100_000)
    values[54_321], values[70_000:71_000] = 9.0, np.nan
    kept = numbers.extremes(values)
    assert len(kept) <= numbers.POINTS + 2
    assert {0, 54_321, 99_999} <= set(kept.tolist())
    assert np.nanmin(values) == np.nanmin(values[kept])
    assert np.isnan(values[kept]).any()
    smoothed = numbers.smooth(np.array([1.0, np.nan, 3.0, 5.0]), 2)
    assert smoothed.tolist() == [1.0, 1.0, 3.0, 4.0]
    assert metrics.COLUMNS[:3] == ("step", "tokens", "loss")
