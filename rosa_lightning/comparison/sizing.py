"""The rank of a method that a budget of trainable parameters gives."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rosa_lightning.adapters.methods import Method as Applied
from rosa_lightning.adapters.methods import apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.comparison.plan import Method, nested
from rosa_lightning.models.loading import load_base, load_skeleton
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.layer import RoAEConfig


def sized(module: RoSAModule, name: str, overrides: dict[str, Any], budget: int | None) -> Method:
    """A method with the rank whose number of trainable parameters comes closest to the budget."""

    def count(rank: int | None) -> int:
        method = with_rank(module.method, rank)
        model: Any = load_skeleton(module.base, **module.loading)
        try:
            return apply_method(model, method).num_trainable
        except ValueError:  # such as SHiRA, which looks at the weights; or the error of a user
            no_bar: Any = disable_progress_bar  # of transformers, within ours
            no_bar()
            return apply_method(load_base(module.base, **module.loading), method).num_trainable

    rank = _rank(module)
    if budget is not None and rank is not None:
        rank = solve_rank(count, budget)
        method = with_rank(module.method, rank)
        key = "model.peft" if isinstance(method, PeftMethod) else "model.roae"
        overrides = nested({**overrides, key: asdict(method)})
    return Method(name, overrides, rank, count(rank))


def _rank(module: RoSAModule) -> int | None:
    method = module.method
    if isinstance(method, RoAEConfig):
        return method.rank
    rank = getattr(method.config(), "r", None) if isinstance(method, PeftMethod) else None
    return rank if isinstance(rank, int) and rank > 0 else None


def with_rank(method: Applied, rank: int | None) -> Applied:
    """A method at another rank and the same scale: its alpha follows."""
    if rank is None:
        return method
    if isinstance(method, RoAEConfig):
        return replace(method, rank=rank, alpha=method.alpha / method.rank * rank)
    if not isinstance(method, PeftMethod):
        return method
    config: Any = method.config()
    init_args = {**method.init_args, "r": rank}
    for name in ("lora_alpha", "alpha"):
        if getattr(config, name, None) is not None:
            # rsLoRA divides by the root of the rank.
            ratio = rank / config.r
            factor = math.sqrt(ratio) if getattr(config, "use_rslora", False) else ratio
            init_args[name] = getattr(config, name) * factor
    return replace(method, init_args=init_args)


def solve_rank(count: Callable[[int], int], budget: int, most: int = 4096) -> int:
    """The rank, up to the highest, whose number of trainable parameters is closest to a budget.

    ``count`` gives that number of a rank; it grows with the rank.
    """
    count = cache(count)
    slope = count(2) - count(1)
    if slope <= 0:
        raise ValueError(
            "its number of trainable parameters does not grow with its rank. Set its size itself, "
            "and leave comparison.trainable_parameters out."
        )
    guess = min(max(1, round((budget - count(1)) / slope) + 1), most)
    if count(guess) == count(1) + slope * (guess - 1):  # as of low-rank terms: no need to search
        return guess
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return min((low, high), key=lambda rank: abs(count(rank) - budget))
