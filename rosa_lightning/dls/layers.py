"""Finds the repeated layers of a module: what trains in them, and the norms that score them.

Pure torch, no trainer. Parameters and modules are named as they are without the wrappers of
torch.compile, FSDP1 and checkpoint_wrapper, so that checkpoints agree.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

_WRAPPERS = ("OptimizedModule", "FullyShardedDataParallel", "CheckpointWrapper")
"""Classes of torch that hold one module and stand in its place."""


@dataclass(frozen=True)
class Layer:
    """One layer that can be selected."""

    name: str
    """Dotted path from the root module."""
    index: int
    """Index in the list of layers."""
    num_layers: int
    """Length of that list."""
    norms: tuple[nn.Parameter, ...]
    """The norm weights whose gradients score the layer."""
    candidates: dict[str, nn.Parameter]
    """The parameters that train while the layer is active, by their full names."""

    def set_active(self, active: bool) -> None:
        """Let the candidates train, or freeze them."""
        for parameter in self.candidates.values():
            parameter.requires_grad_(active)
            if not active:
                # None, not zero: AdamW still moves a weight whose gradient is zero.
                parameter.grad = None


def find_layers(
    root: nn.Module,
    path: str | None = None,
    norms: str | None = None,
    trainable: str | None = None,
) -> list[Layer]:
    """The layers of root in which something trains.

    Args:
        root: The module to look into.
        path: Dotted path of the ModuleList (or Sequential) of layers, or a pattern such as
            "*.layers" that one path matches; None finds the only one.
        norms: Pattern on the names of norm modules inside a layer, several separated by commas;
            None takes the layer's direct children whose class name contains "Norm".
        trainable: Pattern on parameter names inside a layer, likewise; only those that require a
            gradient now are candidates.

    Raises:
        ValueError: Nothing is found, or more than one list, or layers share a parameter.
    """
    path = _only_stack(root) if path is None else _stack_path(root, path)
    stack = _stacks(root)[path]
    found = [_layer(path, stack, index, norms, trainable) for index in range(len(stack))]
    layers = [layer for layer in found if layer is not None]
    if not layers:
        raise ValueError(
            f"There is nothing to train in {path!r}: no parameter {trainable or ''} in its layers "
            "requires a gradient. Unfreeze them or add adapters before fit, or mend trainable=."
        )
    owners: dict[nn.Parameter, str] = {}
    for layer in layers:
        for setting, weights in (("trainable", layer.candidates.values()), ("norms", layer.norms)):
            for weight in weights:
                if (owner := owners.setdefault(weight, layer.name)) != layer.name:
                    raise ValueError(
                        f"Layers {owner!r} and {layer.name!r} share a parameter, which cannot "
                        f"follow one of them. Leave it out with a pattern for {setting}=."
                    )
    return layers


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm, RMSNorm or the like, by its class name."""
    return "Norm" in type(_trained(module)).__name__


def outermost_lists(
    root: nn.Module, wanted: Callable[[nn.ModuleList], bool]
) -> dict[str, nn.ModuleList]:
    """The ModuleLists that are wanted, without those inside another, by dotted path."""
    found: dict[str, nn.ModuleList] = {}
    for name, stack in _stacks(root).items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(stack, nn.ModuleList) and not inside and wanted(stack):
            found[name] = stack
    return found


def _walk(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """What named_modules gives where nothing is wrapped."""
    module, seen = _unwrapped(module), set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, child in module.named_children():
            yield from _walk(child, f"{path}.{name}".removeprefix("."), seen)


def _unwrapped(module: nn.Module) -> nn.Module:
    while type(module).__name__ in _WRAPPERS:
        module = next(module.children())
    return module


def _stacks(root: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    kinds = nn.ModuleList | nn.Sequential
    return {name: m for name, m in _walk(root) if isinstance(m, kinds) and len(m) > 0}


def _only_stack(root: nn.Module) -> str:
    def repeats_and_trains(stack: nn.ModuleList) -> bool:
        alike = len({type(_unwrapped(block)) for block in stack}) == 1
        return len(stack) > 1 and alike and any(p.requires_grad for p in stack.parameters())

    found = list(outermost_lists(root, repeats_and_trains))
    if len(found) != 1:
        raise ValueError(
            "Expected one ModuleList of at least two layers of one class in which something "
            f"trains in {type(root).__name__}, found {len(found)}: {', '.join(found[:5])}. Name "
            "the one to select from with layers=."
        )
    return found[0]


def _stack_path(root: nn.Module, wanted: str) -> str:
    """The one list that a path or pattern names."""
    stacks = list(_stacks(root))
    matching = [wanted] if wanted in stacks else [n for n in stacks if fnmatchcase(n, wanted)]
    if len(matching) != 1:
        close = matching or get_close_matches(wanted, stacks, cutoff=0.4) or stacks
        raise ValueError(
            f"layers={wanted!r} matches {len(matching)} lists of layers in {type(root).__name__}. "
            f"Set the path of one, such as {', '.join(close[:5]) or 'layers, which it lacks'}."
        )
    return matching[0]


def _layer(
    path: str,
    stack: nn.ModuleList | nn.Sequential,
    index: int,
    norms: str | None,
    trainable: str | None,
) -> Layer | None:
    """One layer; None where nothing in it trains."""
    name, block = f"{path}.{index}", _unwrapped(stack[index])
    inside = dict(_walk(block))
    candidates = {
        f"{name}.{inner}": parameter
        for prefix, module in inside.items()
        for own, parameter in module.named_parameters(recurse=False)
        for inner in [f"{prefix}.{own}".removeprefix(".")]
        if parameter.requires_grad and (trainable is None or _matches(inner, trainable))
    }
    if not candidates:
        return None
    modules = {n: m for n, m in inside.items() if n and (norms is not None or "." not in n)}
    # What stands inside a norm that PEFT has wrapped is seen through the wrapper.
    wrapped = tuple(f"{inner}." for inner, module in modules.items() if _copies(module))
    wanted = [
        _trained(module)
        for inner, module in modules.items()
        if not inner.startswith(wrapped)
        and (is_norm(module) if norms is None else _matches(inner, norms))
    ]
    weights = [getattr(module, "weight", None) for module in wanted]
    scored = tuple(w for w in weights if isinstance(w, nn.Parameter) and w.ndim == 1)
    if not scored:
        there = ", ".join(inner for inner, module in inside.items() if is_norm(module))
        raise ValueError(
            f"Layer {name!r} has no norm weight to be scored by; norms inside it: "
            f"{there or 'none'}. Set norms= to a pattern of modules with a 1-D weight."
        )
    return Layer(name, index, len(stack), norms=scored, candidates=candidates)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def _trained(module: nn.Module) -> nn.Module:
    """The module itself, or the copy of it that PEFT trains in its stead."""
    module = _unwrapped(module)
    copies = _copies(module)
    if copies is None:
        return module
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    original = next(m for m in module.children() if m is not copies)
    off = getattr(module, "disable_adapters", False) or not active
    return _trained(original if off else copies[active[0]])


def _copies(module: nn.Module) -> nn.ModuleDict | None:
    """Of modules_to_save and of LN tuning in PEFT: the copies, beside the original."""
    children = dict(_unwrapped(module).named_children())
    kept = (children.get(name) for name in ("modules_to_save", "ln_tuning_layers"))
    return next((copies for copies in kept if isinstance(copies, nn.ModuleDict)), None)
