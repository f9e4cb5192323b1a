"""The peak learning rate for a size: TinyLlama's at its own, scaled by a published exponent, and what other rules say.

TinyLlama (Zhang et al. 2024, arXiv 2401.02385) trained 1.1B with 4e-4, AdamW and batches of 2M tokens. Between sizes the
rate goes with N^(-1/3), as in Porian et al. (2024, arXiv 2406.19146), whose fit OLMo-core's model ladder uses too, at half
of its height. Rules of whole recipes differ sixfold at one size: they are shown beside the one taken.
"""

from __future__ import annotations

from typing import Any

LR, PARAMS = 4e-4, 1_100_048_384
EXPONENT = -1 / 3
MIN_LR_FRAC = 0.1  # TinyLlama's
RULE = "TinyLlama's 4e-4 at 1.1B, times (N / 1.1e9)^(-1/3) (the exponent: Porian et al. 2024, OLMo-core's ladder)"


def learning_rate(params: float) -> float:
    """The peak rate for `params` parameters, to three digits."""
    return float(f"{LR * (params / PARAMS) ** EXPONENT:.3g}")


def other_rules(params: float, tokens: float) -> dict[str, float]:
    """What other published rules give; of those marked * only summaries were read, not the papers."""
    n, d = params, tokens
    porian = 0.0047 * (n / 108e6) ** (-1 / 3)
    return {
        "Porian et al. 2024": porian,
        "OLMo-core's ladder": porian / 2,
        "Step Law*": 1.79 * n**-0.713 * d**0.307,
        "DeepSeek*": 0.3118 * (6 * n * d) ** -0.125,
        "Bjorck et al.*": 1.55e-3 * (n / 1e9) ** -0.23 * (d / 1e9) ** -0.32,
    }


def describe(params: float, tokens: float) -> dict[str, Any]:
    """lr, min_lr, the rule and the others', JSON-ready; `text` is one line."""
    lr, others = learning_rate(params), other_rules(params, tokens)
    least, most = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
    text = f"learning rate {lr:g}: {RULE}; other rules say {others[least]:.2g} ({least}) to {others[most]:.2g} ({most})"
    return {"lr": lr, "min_lr": float(f"{lr * MIN_LR_FRAC:.3g}"), "rule": RULE, "others": others, "text": text}
