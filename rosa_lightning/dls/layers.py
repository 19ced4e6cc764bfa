"""Finds the repeated layers of a module: what trains in them, and the norms that score them.

Pure torch, no trainer. Parameters and modules are named as they are without the wrappers of
torch.compile, FSDP1 and checkpoint_wrapper (read in torch 2.13), so that checkpoints agree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, FSDP1 and checkpoint_wrapper keep the module that they stand around."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What selection needs to know of one layer."""

    name: str
    """Dotted path from the root module."""
    index: int
    """Position in the list of layers."""
    num_above: int
    """Layers above it in the list: a backward runs through them before it gets here."""
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

    Layers in which nothing trains (one without rotation carries no adapter) are left out.

    Args:
        root: The module to look into.
        path: Dotted path of the ModuleList (or Sequential) of layers, or a pattern such as
            "*.layers" that one path matches; None finds the only one.
        norms: Pattern on the names of norm modules inside a layer, several separated by commas;
            None takes the layer's direct children whose class name contains "Norm".
        trainable: Pattern on parameter names inside a layer, likewise. Candidates are the
            matching parameters (None: all) that require a gradient now.

    Raises:
        ValueError: Nothing is found, or more than one thing, or layers share a candidate.
    """
    path = _only_stack(root) if path is None else _stack_path(root, path)
    stack = dict(_stacks(root))[path]
    found = [_layer(path, stack, index, norms, trainable) for index in range(len(stack))]
    layers = [layer for layer in found if layer is not None]
    if not layers:
        raise ValueError(
            f"There is nothing to train in {path!r}: no parameter {trainable or ''} in its layers "
            "requires a gradient. Unfreeze them or add adapters before fit, or mend trainable=."
        )
    owners: dict[nn.Parameter, str] = {}
    for layer in layers:
        for parameter in (*layer.candidates.values(), *layer.norms):
            if (owner := owners.setdefault(parameter, layer.name)) != layer.name:
                is_norm = any(parameter is norm for norm in layer.norms)
                kind, setting = ("norm", "norms") if is_norm else ("parameter", "trainable")
                raise ValueError(
                    f"A {kind} of layer {layer.name!r} also belongs to layer {owner!r}, so that it "
                    f"cannot follow one layer. Leave it out with a pattern for {setting}=."
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
    for name, stack in _stacks(root):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(stack, nn.ModuleList) and not inside and wanted(stack):
            found[name] = stack
    return found


def _stacks(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            yield _plain(name), module


def _only_stack(root: nn.Module) -> str:
    found = outermost_lists(root, _repeats_and_trains)
    if len(found) != 1:
        told = _listed([f"{name} ({len(stack)} layers)" for name, stack in found.items()])
        raise ValueError(
            "Expected one ModuleList of at least two layers of one class in which something "
            f"trains in {type(root).__name__}, found {len(found)}{': ' * bool(found)}{told}. Name "
            "the one to select from with layers=."
        )
    return next(iter(found))


def _repeats_and_trains(stack: nn.ModuleList) -> bool:
    alike = len({type(_unwrapped(block)) for block in stack}) == 1
    return len(stack) > 1 and alike and any(p.requires_grad for p in stack.parameters())


def _stack_path(root: nn.Module, wanted: str) -> str:
    """The one list that a path or pattern names."""
    stacks = [name for name, _ in _stacks(root)]
    matching = [wanted] if wanted in stacks else [n for n in stacks if fnmatchcase(n, wanted)]
    if len(matching) == 1:
        return matching[0]
    modules = {_plain(name): module for name, module in root.named_modules()}
    if matching:
        problem = f"matches {len(matching)} lists in {type(root).__name__}: {_listed(matching)}"
    elif wanted in modules:
        problem = f"is a {type(modules[wanted]).__name__}; expected a ModuleList of layers"
    else:
        problem = f"matches nothing in {type(root).__name__}; expected the path of a ModuleList"
    close = get_close_matches(wanted, stacks, n=3, cutoff=0.4) or stacks[:3]
    hint = f"Nearest: {', '.join(close)}." if close else "The model has none."
    raise ValueError(f"layers={wanted!r} {problem}. {hint}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *[f"{len(names) - 5} more"] * (len(names) > 5)])


def _layer(
    path: str,
    stack: nn.ModuleList | nn.Sequential,
    index: int,
    norms: str | None,
    trainable: str | None,
) -> Layer | None:
    """One layer; None where nothing in it trains."""
    name, block = f"{path}.{index}", _unwrapped(stack[index])
    parameters = {_plain(inner): parameter for inner, parameter in block.named_parameters()}
    candidates = {
        f"{name}.{inner}": parameter
        for inner, parameter in parameters.items()
        if parameter.requires_grad and (trainable is None or _matches(inner, trainable))
    }
    if not candidates:
        return None
    modules = dict(block.named_modules() if norms is not None else block.named_children())
    # What stands inside a norm that PEFT has wrapped is seen through the wrapper.
    wrapped = tuple(f"{inner}." for inner, module in modules.items() if _copies(module))
    wanted = [
        _trained(module)
        for inner, module in modules.items()
        if not inner.startswith(wrapped)
        and (is_norm(module) if norms is None else _matches(_plain(inner), norms))
    ]
    weights = [getattr(module, "weight", None) for module in wanted]
    scored = tuple(w for w in weights if isinstance(w, nn.Parameter) and w.ndim == 1)
    if not scored:
        inside = [_plain(i) for i, m in block.named_modules() if is_norm(m)]
        raise ValueError(
            f"Layer {name!r} has no norm weight to be scored by; norms inside it: "
            f"{', '.join(inside) or 'none'}. Set norms= to a pattern of modules with a 1-D weight."
        )
    num_above = len(stack) - 1 - index
    return Layer(name=name, index=index, num_above=num_above, norms=scored, candidates=candidates)


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


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module itself; a wrapper's parameters are the same objects."""
    while inner := next((m for name, m in module.named_children() if name in _WRAPPERS), None):
        module = inner
    return module


def _plain(name: str) -> str:
    """A dotted path as it is without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
