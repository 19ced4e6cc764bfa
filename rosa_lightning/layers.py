"""The repeated layers of a module: what trains in them, and the norms by which they are scored.

Pure torch, no trainer. Layers are found by the dotted path of their list, or as the only list of
repeated blocks; names are resolved against the module, never evaluated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What selection needs to know of one layer."""

    name: str
    """Dotted path from the root module."""
    index: int
    """Position in the list of blocks."""
    num_above: int
    """Blocks above it in the list: a backward runs through them before it gets here."""
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
    found = [_layer(path, blocks, index, norms, trainable) for index in range(len(blocks))]
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
    path: str,
    blocks: nn.ModuleList | nn.Sequential,
    index: int,
    norms: str | None,
    trainable: str | None,
) -> Layer | None:
    """One layer; None where nothing in it trains."""
    name, block = f"{path}.{index}", _unwrapped(blocks[index])
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
    return Layer(
        name=name,
        index=index,
        num_above=len(blocks) - 1 - index,
        norms=tuple(scored),
        candidates=candidates,
    )


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
