"""Scores of layers and the policies that select by them: all decisions of layer selection.

Pure functions (Pan et al., RoSA, AAAI-26, https://doi.org/10.1609/aaai.v40i18.38589). Scores are
1-D float64 tensors, one entry per layer; a policy gives the sorted indices of those that train.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import torch
from torch import Generator, Tensor

Policy = Literal["top_k", "sample", "threshold", "random", "all", "fixed"]
Normalization = Literal["none", "sqrt_size", "running_mean"]


def layer_scores(gradients: Sequence[Sequence[Tensor | None]], scale: float = 1.0) -> Tensor:
    """L2 norm over each layer's gradients, shape (num_candidates,), float64 on the CPU.

    None counts as zero; scores are divided by the scale of the loss.
    """
    norms: list[Tensor] = []
    for layer in gradients:
        parts = [_norm(gradient) for gradient in layer if gradient is not None]
        norms.append(_norm(torch.stack(parts)) if parts else torch.zeros(()))
    # Gathered on the first gradient's device, so that the whole model costs one transfer.
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), None)
    return torch.stack([norm.to(device) for norm in norms]).cpu().double() / scale


def _norm(gradient: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    dtype = torch.float32 if gradient.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=dtype)
    return norm


def normalize_scores(
    scores: Sequence[float],
    normalization: Normalization,
    num_weights: Sequence[int],
    means: Sequence[float] | None,
) -> Tensor:
    """Scores made comparable between layers, by their sizes or by what is usual for them.

    The means are those of all scores so far; None at the first selection.
    """
    units: Sequence[float] = [1.0] * len(scores)
    if normalization == "sqrt_size":
        units = [math.sqrt(count) for count in num_weights]
    elif normalization == "running_mean" and means is not None:
        units = means
    # A layer whose scores were all zero has no unit, and stays at zero.
    values = [value / unit if unit > 0 else 0.0 for value, unit in zip(scores, units, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def top_k(scores: Tensor, num_active: int) -> tuple[int, ...]:
    """The num_active highest-scoring layers, sorted; of equal scores the lower index wins."""
    return tuple(sorted(_ranked(scores.tolist())[:num_active]))


def sample(
    scores: Tensor, num_active: int, temperature: float, generator: Generator
) -> tuple[int, ...]:
    """num_active layers drawn without replacement in proportion to score**(1 / temperature).

    The Gumbel form of drawing one layer after another, in log space, where nothing underflows. A
    layer that scores zero is drawn only when no other is left, and then with equal chances.
    """
    values = scores.tolist()
    logs_L = scores.double().log()
    logs_L = (logs_L - logs_L.max()) / temperature if max(values) > 0 else logs_L
    waits_L = torch.empty(len(values), dtype=torch.float64).exponential_(generator=generator)
    gumbels, logs = (-waits_L.log()).tolist(), logs_L.tolist()

    def rank(index: int) -> tuple[float, ...]:
        if values[index] == 0:
            return (1, -gumbels[index], 0, index)
        return (0, -(logs[index] + gumbels[index]), -values[index], index)

    return tuple(sorted(sorted(range(len(values)), key=rank)[:num_active]))


def threshold(scores: Tensor, share: float, held: Sequence[int] = ()) -> tuple[int, ...]:
    """The smallest set of layers, sorted, that holds at least this share of the total score.

    The highest-scoring layers come first, of equal scores the lower index; at least one is taken.
    Held layers are in the set in any case, and count.
    """
    values = scores.tolist()
    exact = [Fraction(value) for value in values]
    wanted = Fraction(str(share)) * sum(exact)  # 0.9 is nine tenths
    order = [*sorted(set(held)), *(index for index in _ranked(values) if index not in held)]
    sums = accumulate(exact[index] for index in order)
    needed = next(count for count, held_so_far in enumerate(sums, 1) if held_so_far >= wanted)
    return tuple(sorted(order[: max(needed, len(set(held)))]))


def random_subset(num_candidates: int, num_active: int, generator: Generator) -> tuple[int, ...]:
    """num_active of num_candidates layers, every subset equally likely: the control for scores."""
    return tuple(sorted(torch.randperm(num_candidates, generator=generator)[:num_active].tolist()))


def select_layers(
    policy: Policy,
    scores: Tensor,
    num_active: int,
    *,
    generator: Generator,
    temperature: float = 1.0,
    score_share: float = 0.5,
    always_active: Sequence[int] = (),
    fixed_layers: Sequence[int] = (),
    floor: int = 0,
) -> tuple[int, ...]:
    """The layers that train next, sorted: always_active and what the policy adds to them.

    num_active counts the always_active layers too. From below the floor no policy but "fixed" takes
    a layer, even where fewer than num_active are left above it.
    """
    always = tuple(sorted(set(always_active)))
    if policy == "fixed":
        return tuple(sorted({*always, *fixed_layers}))
    open_layers = [i for i in range(len(scores)) if i >= floor or i in always]
    free = [index for index in open_layers if index not in always]
    count = min(num_active - len(always), len(free))
    if policy == "all":
        chosen = free
    elif policy == "threshold":
        held = [place for place, index in enumerate(open_layers) if index in always]
        return tuple(open_layers[i] for i in threshold(scores[open_layers], score_share, held))
    elif count <= 0:
        chosen = []
    elif policy == "top_k":
        chosen = [free[place] for place in top_k(scores[free], count)]
    elif policy == "sample":
        chosen = [free[place] for place in sample(scores[free], count, temperature, generator)]
    else:
        chosen = [free[place] for place in random_subset(len(free), count, generator)]
    return tuple(sorted({*always, *chosen}))


def resolve_num_active(num_active: int | float, num_candidates: int | None = None) -> int:
    """The number of active layers that a count or a fraction in (0, 1] means.

    A fraction is rounded to the nearest count, halves up, and never below one layer. Without
    num_candidates only what can be known without a model is checked, and a fraction gives 1.
    """
    if isinstance(num_active, float) and 0 < num_active <= 1:
        return max(1, math.floor(num_active * (num_candidates or 1) + 0.5))
    whole = isinstance(num_active, int) and not isinstance(num_active, bool)
    if whole and 1 <= num_active <= (num_candidates or math.inf):
        return int(num_active)
    most = f" and at most the model's {num_candidates}" if num_candidates else ""
    raise ValueError(
        f"num_active={num_active!r} is out of range. Set a count of layers, at least 1{most}, or a "
        "fraction in (0, 1] such as 0.5."
    )


def resolve_indices(
    name: str, given: Sequence[int], candidate_layers: Sequence[int]
) -> tuple[int, ...]:
    """Where the given layers stand among the candidates, ascending; -1 is the last of those."""
    wanted = {layer + candidate_layers[-1] + 1 if layer < 0 else layer for layer in given}
    if not wanted <= set(candidate_layers):
        raise ValueError(
            f"{name}={list(given)} names a layer that cannot be selected. Set any of "
            f"{list(candidate_layers)}, or count from the last layer with -1."
        )
    return tuple(sorted(candidate_layers.index(layer) for layer in wanted))


def _ranked(values: Sequence[float]) -> list[int]:
    """Indices from the highest value down, of equal values the lower index first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))
