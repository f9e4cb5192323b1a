"""What `tinyllama plan` answers: the best model for a goal, under each fit, with its costs. Results are JSON-ready.

A goal is a loss, or a budget of training (or of training and serving). The reference, which savings and break-even are
counted from, is the model of the same loss, from the same data, that is cheapest to train.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tinyllama import hardware
from tinyllama.planner.allocation import Allocation, Frontier, PlanError, break_even_demand, implied_demand
from tinyllama.planner.cost import INPUT_MFU, OUTPUT_MFU, Costs
from tinyllama.planner.fits import CAVEATS, Fit
from tinyllama.planner.repeats import Data

EXTREME_TOKENS_PER_PARAM = 1e4  # the most that Sardana et al. tested
DISAGREEMENT_FRAC = 0.2


@dataclasses.dataclass(frozen=True)
class Goal:
    """One of `loss`, `loss_of` (that of the compute-optimal model of so many parameters) and `budget` in `unit`."""

    loss: float | None = None
    loss_of: float | None = None
    budget: float | None = None
    unit: str = "train_flops"
    lifetime: bool = False  # the budget pays for serving too


@dataclasses.dataclass(frozen=True)
class Request:
    """A goal, the lifetime demand, the data, how costs are counted, and a deadline. in_dollars: dollars are minimised."""

    goal: Goal
    costs: Costs
    demand: float = 0.0
    data: Data = Data()
    in_dollars: bool = False
    gpus: int | None = None
    deadline_days: float | None = None

    @property
    def weight(self) -> float:
        """What a served FLOP counts against a trained one."""
        return self.costs.demand_weight if self.in_dollars else 1.0

    def budget_spent(self, model: Allocation) -> float:
        """What a model, with its true demand, takes of the budget."""
        costs, life = self.costs, self.goal.lifetime
        if self.goal.unit == "gpu_hours":
            return costs.train_hours(model) + (costs.inference_hours(model) if life else 0)
        if self.goal.unit == "dollars":
            return costs.train_dollars(model) + (costs.inference_dollars(model) if life else 0)
        return model.total_flops if life else model.train_flops


def solve(request: Request, fit: Fit) -> tuple[Allocation, float]:
    """The best model and its loss; PlanError where there is none."""
    goal = request.goal
    frontier = Frontier(fit, request.demand * request.weight, request.data)
    if goal.budget is not None:
        what = f"a budget of {goal.budget:g} {goal.unit.replace('_', ' ')}"
        best = frontier.for_cost(lambda a: request.budget_spent(a.serving(request.demand)), goal.budget, what)
        return best.serving(request.demand), request.data.loss(fit, best.params, best.tokens)
    loss = goal.loss
    if goal.loss_of is not None:
        loss = fit.loss(goal.loss_of, fit.optimal_tokens(goal.loss_of))
    assert loss is not None
    return frontier.for_loss(loss).serving(request.demand), loss


def plan(request: Request, fit: Fit) -> dict[str, Any]:
    """The plan under one fit."""
    best, loss = solve(request, fit)
    reference = Frontier(fit, 0.0, request.data).for_loss(loss).serving(request.demand)
    money, reference_money = request.costs.describe(best), request.costs.describe(reference)
    same = math.isclose(best.params, reference.params, rel_tol=1e-9)  # rounding is no saving
    break_even = break_even_demand(best, reference)
    return {
        "fit": fit.name,
        "loss": loss,
        **sizes(best, request.data),
        "train_flops": best.train_flops,
        "inference_flops": best.inference_flops,
        "total_flops": best.total_flops,
        "saved_frac": 0.0 if same else 1 - best.total_flops / reference.total_flops,
        **money,
        "saved_dollars_frac": 0.0 if same else 1 - money["total_dollars"] / reference_money["total_dollars"],
        "break_even_demand": None if break_even is None else break_even / request.weight,
        "reference": {
            **sizes(reference, request.data),
            "train_flops": reference.train_flops,
            "total_flops": reference.total_flops,
            "total_dollars": reference_money["total_dollars"],
        },
        **schedule(request, money["train_gpu_hours"]),
        "warnings": warnings(best, fit),
    }


def warnings(model: Allocation, fit: Fit) -> list[str]:
    """What to beware of in this fit, and where the model is outside of what anybody has tested."""
    ratio = model.tokens / model.params
    found = [fit.caveat] if fit.caveat else []
    if ratio > EXTREME_TOKENS_PER_PARAM:
        found.append(f"{ratio:,.0f} tokens per parameter: beyond the 10,000 that Sardana et al. tested")
    return found


def sizes(model: Allocation, data: Data) -> dict[str, float]:
    """N, D and what follows from them."""
    return {
        "params": model.params,
        "tokens": model.tokens,
        "tokens_per_param": model.tokens / model.params,
        "epochs": data.epochs(model.tokens),
        "effective_tokens": data.effective_tokens(model.tokens),
    }


def schedule(request: Request, train_hours: float) -> dict[str, float | int | None]:
    """Days on the GPUs given, or how many GPUs the deadline needs; PlanError where the GPUs miss it."""
    gpus, days = request.gpus, request.deadline_days
    if days is not None:
        needed = math.ceil(train_hours / (days * 24) * (1 - 1e-9))
        if gpus is not None and gpus < needed:
            raise PlanError(
                f"training takes {train_hours:,.0f} GPU-hours, {train_hours / 24 / gpus:,.1f} days on --gpus {gpus}, "
                f"longer than --deadline-days {days:g}",
                fix=f"give at least --gpus {needed}, or ask for less",
            )
        gpus = gpus or needed
    return {"gpus": gpus, "train_days": train_hours / 24 / gpus if gpus else None}


def plan_all(request: Request, fits: list[Fit]) -> dict[str, Any]:
    """The plan of the first fit, with those of all under `fits`, their disagreement and the caveats.

    A fit that cannot reach the goal holds `error` instead; if the first cannot, PlanError.
    """
    found: dict[str, dict[str, Any]] = {fits[0].name: plan(request, fits[0])}
    for fit in fits[1:]:
        try:
            found[fit.name] = plan(request, fit)
        except PlanError as error:
            found[fit.name] = {"fit": fit.name, "error": str(error)}
    spread = disagreement([found[fit.name] for fit in fits if fit.plans and "error" not in found[fit.name]])
    caveats = common_caveats(request)
    if spread and max(spread["params_frac"], spread["tokens_frac"]) > DISAGREEMENT_FRAC:
        caveats.append(
            f"The fits disagree by {spread['params_frac']:.0%} about parameters and {spread['tokens_frac']:.0%} about "
            "tokens (largest over smallest): train a small ladder of your own before you spend."
        )
    return {
        **found[fits[0].name],
        "inference_tokens": request.demand,
        "fits": found,
        "disagreement": spread,
        "assumptions": assumptions(request),
        "caveats": caveats,
    }


def disagreement(plans: list[dict[str, Any]]) -> dict[str, float] | None:
    """Largest over smallest, less one, of what the fits say; None of fewer than two."""
    if len(plans) < 2:
        return None
    keys = ("params", "tokens", "total_flops")
    return {f"{key}_frac": max(p[key] for p in plans) / min(p[key] for p in plans) - 1 for key in keys}


def common_caveats(request: Request) -> list[str]:
    """What holds of every fit."""
    caveats = list(CAVEATS)
    if math.isfinite(request.data.unique):
        caveats.append("What repeats are worth was measured with Muennighoff et al.'s own fit; other fits borrow it.")
    measured, priced = request.costs.measured, request.costs.inference.name
    if measured and not is_called(measured.device, priced):
        caveats.append(f"Serving was measured on {measured.device} and is priced as {priced}.")
    return caveats


def is_called(driver_name: str, name: str) -> bool:
    """Whether a measured device is the one priced as `name`; one of a user's own table by the first word of its name."""
    known = hardware.find(driver_name)
    return known.name == name if known else name.partition("-")[0].lower() in driver_name.lower()


def assumptions(request: Request) -> dict[str, Any]:
    """What the costs rest on."""
    costs, limited = request.costs, math.isfinite(request.data.unique)
    return {
        "minimised": "dollars" if request.in_dollars else "flops",
        "device": dataclasses.asdict(costs.train),
        "inference_device": dataclasses.asdict(costs.inference),
        "train_mfu": costs.train_mfu,
        "train_mfu_source": costs.train_mfu_source,
        "serving": f"MFU {INPUT_MFU:g} of prompts, {OUTPUT_MFU:g} of generated tokens"
        if costs.measured is None
        else f"{costs.measured.tokens_per_s:,.0f} tokens/s measured of {costs.measured.source}",
        "output_frac": costs.output_frac,
        "unique_tokens": request.data.unique if limited else None,
        "max_epochs": request.data.max_epochs if limited else None,
    }


def explain(params: float, tokens: float, request: Request, fits: list[Fit]) -> dict[str, Any]:
    """A given (N, D) under each fit: its loss, the compute-optimal models beside it, and the demand that it is made for."""
    data, model = request.data, Allocation(params, tokens, request.demand)
    return {
        **sizes(model, data),
        "train_flops": model.train_flops,
        "inference_flops": model.inference_flops,
        "total_flops": model.total_flops,
        **request.costs.describe(model),
        **schedule(request, request.costs.train_hours(model)),
        "inference_tokens": request.demand,
        "fits": {fit.name: _explain(model, request, fit) for fit in fits},
        "assumptions": assumptions(request),
        "caveats": common_caveats(request),
    }


def _explain(model: Allocation, request: Request, fit: Fit) -> dict[str, Any]:
    """same_flops: what the training FLOPs could have bought; same_loss: the cheapest training for this loss.

    Both from unlimited data: how much the lack of it costs is a part of the answer.
    """
    loss = request.data.loss(fit, model.params, model.tokens)
    same_flops = Allocation(*fit.compute_optimal(model.train_flops))
    same_loss = Allocation(*fit.compute_optimal_for(loss))
    break_even = break_even_demand(model, same_loss)
    demand = implied_demand(fit, model.params, model.tokens, request.data)
    return {
        "loss": loss,
        "optimal_tokens_for_params": fit.optimal_tokens(model.params),
        "same_flops": {
            "params": same_flops.params,
            "tokens": same_flops.tokens,
            "loss": fit.loss(same_flops.params, same_flops.tokens),
        },
        "same_loss": {
            "params": same_loss.params,
            "tokens": same_loss.tokens,
            "train_flops": same_loss.train_flops,
        },
        "train_flops_ratio": model.train_flops / same_loss.train_flops,
        "break_even_demand": None if break_even is None else break_even / request.weight,
        "optimal_at_demand": demand / request.weight if 0 <= demand < math.inf else None,
        "warnings": warnings(model, fit),
    }
