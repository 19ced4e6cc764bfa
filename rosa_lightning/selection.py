"""Which layers train: find them in a module, score them, choose among them.

Pure torch, no trainer: the decision of Dynamic Layer Selection (RoSA, doi
10.1609/aaai.v40i18.38589), usable in any training loop. A layer's score is the L2 norm of the
gradients of its norm weights; a policy turns the scores of all layers into the sorted indices of
those that train. Scores are 1-D tensors, one entry per layer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Generator, Tensor, nn

Policy = Literal["top_k", "sample", "random", "all", "fixed"]


def layer_scores(gradients: Sequence[Sequence[Tensor | None]], scale: float = 1.0) -> Tensor:
    """L2 norm over each layer's gradients, shape (num_layers,), float64 on the CPU.

    Args:
        gradients: For each layer the gradients of its norm weights; None counts as zero.
        scale: The loss scale contained in the gradients; scores are divided by it.
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


def top_k(scores: Tensor, num_active: int) -> tuple[int, ...]:
    """The num_active highest-scoring layers, sorted; of equal scores the lower index wins."""
    values = _checked(scores, num_active)
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    return tuple(sorted(order[:num_active]))


def sample(
    scores: Tensor, num_active: int, temperature: float, generator: Generator
) -> tuple[int, ...]:
    """num_active layers drawn without replacement in proportion to score**(1 / temperature).

    The draw is the Gumbel form of drawing one layer after another, in log space: neither tiny
    scores nor tiny temperatures underflow. A layer that scores zero is drawn only when no other
    is left, and then with equal chances. Every call takes num_layers numbers from the generator.
    """
    values = _checked(scores, num_active)
    if min(values) < 0:
        raise ValueError(f"A layer scores {min(values)}; sampling needs scores of 0 or above.")
    logs_L = scores.detach().cpu().double().log()
    logs_L = (logs_L - logs_L.max()) / temperature if max(values) > 0 else logs_L
    waits_L = torch.empty(len(values), dtype=torch.float64).exponential_(generator=generator)
    gumbels = (-waits_L.log()).tolist()
    logs = logs_L.tolist()

    def rank(index: int) -> tuple[float, ...]:
        if values[index] == 0:
            return (1, -gumbels[index], 0, index)
        return (0, -(logs[index] + gumbels[index]), -values[index], index)

    return tuple(sorted(sorted(range(len(values)), key=rank)[:num_active]))


def random_subset(num_layers: int, num_active: int, generator: Generator) -> tuple[int, ...]:
    """num_active of num_layers layers, every subset equally likely: the control for scores."""
    return tuple(sorted(torch.randperm(num_layers, generator=generator)[:num_active].tolist()))


def select_layers(
    policy: Policy,
    scores: Tensor,
    num_active: int,
    *,
    generator: Generator,
    temperature: float = 1.0,
    always_active: Sequence[int] = (),
    fixed_layers: Sequence[int] = (),
) -> tuple[int, ...]:
    """The layers that train next, sorted: always_active and what the policy adds to them.

    num_active counts the always_active layers too; "all" and "fixed" do not read it.
    """
    if policy == "all":
        return tuple(range(len(scores)))
    if policy == "fixed":
        return tuple(sorted({*always_active, *fixed_layers}))
    free = [index for index in range(len(scores)) if index not in always_active]
    count = num_active - len(set(always_active))
    if count <= 0 or not free:
        return tuple(sorted(set(always_active)))
    if policy == "top_k":
        chosen = top_k(scores[free], count)
    elif policy == "sample":
        chosen = sample(scores[free], count, temperature, generator)
    else:
        chosen = random_subset(len(free), count, generator)
    return tuple(sorted({*always_active, *(free[index] for index in chosen)}))


def resolve_num_active(num_active: int | float, num_layers: int | None = None) -> int:
    """The number of active layers that a count or a fraction in (0, 1] means.

    A fraction is rounded to the nearest count, halves up, and never below one layer. Without
    num_layers only what can be known without a model is checked, and a fraction gives 1.
    """
    given = f"num_active={num_active!r}"
    expected = "Set a count of layers, 1 or more, or a fraction in (0, 1] such as 0.5."
    if isinstance(num_active, bool) or not isinstance(num_active, int | float):
        raise ValueError(f"{given} is a {type(num_active).__name__}, not a number. {expected}")
    if isinstance(num_active, float):
        if not 0 < num_active <= 1:
            raise ValueError(f"{given} is a fraction outside (0, 1]. {expected}")
        return max(1, math.floor(num_active * (num_layers or 1) + 0.5))
    if num_active < 1:
        raise ValueError(f"{given} leaves no layer to train. {expected}")
    if num_layers is not None and num_active > num_layers:
        raise ValueError(f"{given} is above the model's {num_layers} layers. {expected}")
    return num_active


def resolve_indices(name: str, given: Sequence[int], positions: Sequence[int]) -> tuple[int, ...]:
    """Where in ``positions`` the given layers stand, sorted; negative ones count from the last.

    Args:
        name: What an error calls the indices.
        given: Positions of layers in the list of blocks.
        positions: Positions of the layers that can be selected, ascending.

    Raises:
        ValueError: A layer that is not there or has nothing to train.
    """
    wanted = {index + positions[-1] + 1 if index < 0 else index for index in given}
    if not wanted <= set(positions):
        raise ValueError(
            f"{name}={list(given)} names a layer that cannot be selected. Set any of "
            f"{list(positions)}, or count from the last layer with -1."
        )
    return tuple(sorted(positions.index(index) for index in wanted))


def _checked(scores: Tensor, num_active: int) -> list[float]:
    if scores.ndim != 1 or not bool(scores.isfinite().all()):
        raise ValueError(f"Expected one finite score per layer; given {scores.tolist()}.")
    if not 1 <= num_active <= len(scores):
        raise ValueError(f"num_active={num_active} is outside 1 to {len(scores)}, the layers.")
    values: list[float] = scores.detach().cpu().double().tolist()
    return values


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What selection needs to know of one layer."""

    name: str
    """Dotted path from the root module."""
    index: int
    """Position in the list of blocks."""
    norms: tuple[nn.Parameter, ...]
    """The norm weights whose gradients score the layer."""
    candidates: dict[str, nn.Parameter]
    """The parameters that train while the layer is active, by their full names."""


def find_layers(
    root: nn.Module,
    path: str | None = None,
    norms: str | None = None,
    trainable: str | None = None,
) -> list[Layer]:
    """The layers of root, with the norm weights that score them and the parameters that train.

    Blocks in which nothing trains (a layer without rotation carries no adapter) are left out.

    Args:
        root: The module to look into.
        path: Dotted path of the ModuleList (or Sequential) of layers; None finds the only one.
        norms: Pattern on the names of norm modules inside a layer, several separated by commas;
            None takes the layer's direct children whose class name contains "Norm".
        trainable: Pattern on parameter names inside a layer, likewise. Candidates are the
            matching parameters (None: all) that require a gradient now.

    Raises:
        ValueError: Nothing is found, or more than one thing, or layers share a candidate.
    """
    path = _only_stack(root) if path is None else path
    blocks = _blocks(root, path)
    found = [_layer(path, index, block, norms, trainable) for index, block in enumerate(blocks)]
    layers = [layer for layer in found if layer is not None]
    if not layers:
        raise ValueError(
            f"There is nothing to train in {path!r}: no parameter {trainable or ''} in its layers "
            "requires a gradient. Unfreeze them or add adapters before fit, or mend trainable=."
        )
    owners: dict[nn.Parameter, str] = {}
    for layer in layers:
        for name, parameter in layer.candidates.items():
            if (owner := owners.setdefault(parameter, layer.name)) != layer.name:
                raise ValueError(
                    f"{name!r} also belongs to layer {owner!r}; a shared parameter cannot follow "
                    "one layer. Leave it out with a pattern for trainable=."
                )
    return layers


def _stacks(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            yield _plain(name), module


def _only_stack(root: nn.Module) -> str:
    found: dict[str, int] = {}
    for name, stack in _stacks(root):
        one_class = len({type(_unwrapped(block)) for block in stack}) == 1
        trains = any(parameter.requires_grad for parameter in stack.parameters())
        nested = any(name.startswith(f"{outer}.") for outer in found)
        repeated = isinstance(stack, nn.ModuleList) and len(stack) >= 2 and one_class
        if repeated and trains and not nested:
            found[name] = len(stack)
    if len(found) == 1:
        return next(iter(found))
    listed = ", ".join(f"{name} ({length} layers)" for name, length in found.items())
    raise ValueError(
        f"Expected one ModuleList of at least two repeated, trainable layers in "
        f"{type(root).__name__}, found {len(found)}{': ' * bool(found)}{listed}. "
        "Name the one to select from with layers=."
    )


def _blocks(root: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    stacks = dict(_stacks(root))
    if path in stacks:
        return stacks[path]
    close = get_close_matches(path, stacks, n=3, cutoff=0.4) or list(stacks)[:3]
    hint = f"Nearest: {', '.join(close)}." if close else "The model has none."
    found = {_plain(name): module for name, module in root.named_modules()}.get(path)
    if found is None:
        raise ValueError(
            f"layers={path!r} matches nothing in {type(root).__name__}; "
            f"expected the path of a ModuleList. {hint}"
        )
    raise ValueError(
        f"layers={path!r} is a {type(found).__name__}; expected a ModuleList of layers. {hint}"
    )


def _layer(
    path: str, index: int, block: nn.Module, norms: str | None, trainable: str | None
) -> Layer | None:
    """One layer; None where nothing in it trains."""
    name, block = f"{path}.{index}", _unwrapped(block)
    parameters = {_plain(inner): parameter for inner, parameter in block.named_parameters()}
    candidates = {
        f"{name}.{inner}": parameter
        for inner, parameter in parameters.items()
        if parameter.requires_grad and (trainable is None or _matches(inner, trainable))
    }
    if not candidates:
        return None
    modules = dict(block.named_modules() if norms is not None else block.named_children())
    modules = {_plain(inner): _unwrapped(module) for inner, module in modules.items()}
    wanted = {
        inner: module
        for inner, module in modules.items()
        if ("Norm" in type(module).__name__ if norms is None else _matches(inner, norms))
    }
    weights = [getattr(module, "weight", None) for module in wanted.values()]
    scored = [w for w in weights if isinstance(w, nn.Parameter) and w.ndim == 1]
    if not scored:
        inside = [_plain(i) for i, m in block.named_modules() if "Norm" in type(m).__name__]
        raise ValueError(
            f"Layer {name!r} has no norm weight to be scored by; norms inside it: "
            f"{', '.join(inside) or 'none'}. Set norms= to a pattern of modules with a 1-D weight."
        )
    return Layer(name=name, index=index, norms=tuple(scored), candidates=candidates)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, FSDP1 and checkpoint_wrapper keep the module that they stand around."""


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module itself; a wrapper's parameters are the same objects."""
    while inner := next((module._modules[w] for w in _WRAPPERS if w in module._modules), None):
        module = inner
    return module


def _plain(name: str) -> str:
    """A dotted path as it is without wrappers, so that checkpoints agree under every strategy."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
