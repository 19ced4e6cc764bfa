"""The repeated layers of a module: what trains in them, and the norms by which they are scored.

Pure torch, no trainer. Layers are found by the dotted path of their list or a pattern of it, or as
the only list of repeated blocks; names are matched against the module's, never evaluated.
"""

from collections.abc import Iterator, Sequence
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
    blocks = dict(_stacks(root))[path]
    found = [_layer(path, blocks, index, norms, trainable) for index in range(len(blocks))]
    layers = [layer for layer in found if layer is not None]
    if not layers:
        raise ValueError(
            f"There is nothing to train in {path!r}: no parameter {trainable or ''} in its layers "
            "requires a gradient. Unfreeze them or add adapters before fit, or mend trainable=."
        )
    _check_shared(layers)
    return layers


def _check_shared(layers: Sequence[Layer]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for layer in layers:
        for name, parameter in layer.candidates.items():
            if (owner := owners.setdefault(parameter, layer.name)) != layer.name:
                raise ValueError(
                    f"{name!r} also belongs to layer {owner!r}; a shared parameter cannot follow "
                    "one layer. Leave it out with a pattern for trainable=."
                )
        for norm in layer.norms:
            if (owner := owners.setdefault(norm, layer.name)) != layer.name:
                raise ValueError(
                    f"A norm that scores layer {layer.name!r} also belongs to layer {owner!r}, so "
                    "that both would score the same. Set norms= to a pattern of modules that no "
                    "two layers share."
                )


def _stacks(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0:
            yield _plain(name), module


def _only_stack(root: nn.Module) -> str:
    found: dict[str, int] = {}
    flaws: list[str] = []
    for name, stack in _stacks(root):
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if flaw := _flaw(stack):
            flaws.append(f"{name} ({flaw})")
        else:
            found[name] = len(stack)
    if len(found) == 1:
        return next(iter(found))
    told = [f"{name} ({length} layers)" for name, length in found.items()]
    passed_over = _listed(sorted(flaws, key=lambda flaw: flaw.count(".")))
    raise ValueError(
        f"Expected one ModuleList of at least two repeated, trainable layers in "
        f"{type(root).__name__}, found {len(found)}{': ' * bool(found)}{_listed(told)}"
        f"{f'; passed over: {passed_over}' if flaws and not found else ''}. "
        "Name the one to select from with layers=."
    )


def _flaw(stack: nn.ModuleList | nn.Sequential) -> str | None:
    """Why a list is not taken for that of the layers without being named; None if it is."""
    classes = {type(_unwrapped(block)).__name__: None for block in stack}
    if not isinstance(stack, nn.ModuleList):
        return "a Sequential"
    if len(stack) < 2:
        return "one block alone"
    if len({type(_unwrapped(block)) for block in stack}) > 1:
        return f"of different classes: {_listed(list(classes))}"
    if not any(parameter.requires_grad for parameter in stack.parameters()):
        return "nothing in it trains"
    return None


def _stack_path(root: nn.Module, wanted: str) -> str:
    """The one list that a path or pattern names."""
    stacks = [name for name, _ in _stacks(root)]
    matching = [name for name in stacks if fnmatchcase(name, wanted)]
    if wanted in stacks or len(matching) == 1:
        return wanted if wanted in stacks else matching[0]
    if matching:
        raise ValueError(
            f"layers={wanted!r} matches {len(matching)} lists in {type(root).__name__}: "
            f"{_listed(matching)}. Set it to the path of one."
        )
    close = get_close_matches(wanted, stacks, n=3, cutoff=0.4) or stacks[:3]
    hint = f"Nearest: {', '.join(close)}." if close else "The model has none."
    found = {_plain(name): module for name, module in root.named_modules()}.get(wanted)
    if found is None:
        raise ValueError(
            f"layers={wanted!r} matches nothing in {type(root).__name__}; "
            f"expected the path of a ModuleList. {hint}"
        )
    raise ValueError(
        f"layers={wanted!r} is a {type(found).__name__}; expected a ModuleList of layers. {hint}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *[f"{len(names) - 5} more"] * (len(names) > 5)])


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
    # What stands inside a norm that PEFT has wrapped is seen through the wrapper.
    wrapped = tuple(f"{inner}." for inner, module in modules.items() if _copies(module))
    wanted = [
        _trained(module)
        for inner, module in modules.items()
        if not inner.startswith(wrapped)
        and (_is_norm(module) if norms is None else _matches(_plain(inner), norms))
    ]
    weights = [getattr(module, "weight", None) for module in wanted]
    scored = [w for w in weights if isinstance(w, nn.Parameter) and w.ndim == 1]
    if not scored:
        inside = [_plain(i) for i, m in block.named_modules() if _is_norm(m)]
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


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(_trained(module)).__name__


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
    kept = (
        _unwrapped(module)._modules.get(name) for name in ("modules_to_save", "ln_tuning_layers")
    )
    return next((copies for copies in kept if isinstance(copies, nn.ModuleDict)), None)


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
