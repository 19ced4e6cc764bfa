"""Load an adapted base on rank 0, broadcast it to all ranks, and shard it under FSDP.

All ranks but the first get the model with its parameters on the meta device, and then, unit by
unit, their values, so that none ever holds more of the base than its shard and one unit. A unit is
what FSDP gathers at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from rosa_lightning.dls.layers import is_norm, outermost_lists
from rosa_lightning.models.quantization import is_packed
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.utils.agreement import several_ranks, together
from rosa_lightning.utils.modules import replaced_tensors

Loaded = TypeVar("Loaded", bound=tuple[Any, ...])


def is_sharded(strategy: Strategy | None) -> bool:
    """Whether a strategy keeps the parameters in shards."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def load_on_rank_zero(load: Callable[[], Loaded], strategy: Strategy | None) -> Loaded:
    """What `load` gives, a model first, called on rank 0 alone; elsewhere parameters are on meta.

    Where it cannot be sent (packed weights, classes of code that came with a base), every rank
    loads.

    Raises:
        RanksError: `load` failed; says why, on every rank.
    """
    if strategy is None or not several_ranks():
        return load()
    loaded: list[Loaded] = []
    with together("loading of the base"):
        if dist.get_rank() == 0:
            loaded = [load()]
    message = strategy.broadcast(pickle_without_values(loaded[0]) if loaded else None)
    if loaded:
        return loaded[0]
    return load() if message is None else cast(Loaded, pickle.loads(message))


def pickle_without_values(loaded: tuple[Any, ...]) -> bytes | None:
    """A model and what follows it, without the values of parameters; None if that cannot be."""
    model: nn.Module = loaded[0]
    if any(is_packed(parameter) for parameter in model.parameters()):
        return None
    with replaced_tensors(model, _on_meta):
        try:
            return pickle.dumps(loaded)
        except (pickle.PicklingError, AttributeError, TypeError):
            return None


def _on_meta(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)


def shard_and_broadcast(model: nn.Module, strategy: Strategy | None) -> nn.Module:
    """Give every rank the values of rank 0, and shard the model where the strategy shards.

    RoAE adapters are units of their own: FSDP joins or reduces the weights of a unit in one data
    type, and theirs is float32 whatever the base's. So are the norms of a layer, or scoring would
    take room for gradients of the whole base under FSDP1. Weights of PEFT belong to the unit of
    their layer, since PEFT also reads them outside the forward of the module that holds them, and
    so do terms that are added after a norm.
    Returns the model, which FSDP1 wraps.

    Raises:
        ValueError: Tensor parallelism, shards of a quantised base, or data types that FSDP1 cannot
            join.
    """
    if strategy is None:
        return model
    packed = [name for name, weight in model.named_parameters() if is_packed(weight)]
    if packed and is_sharded(strategy):
        raise ValueError(
            f"{strategy.__class__.__name__} cannot shard a quantised base ({packed[0]}). Set "
            "trainer.strategy to ddp, or leave model.quantization out."
        )
    shard = _shard_function(strategy)
    # What belongs to which unit must be known before a wrapper stands in between.
    plan: list[tuple[str, list[tuple[nn.Module, str]]]] = []
    taken: set[nn.Module] = set()
    for path in [*_units(model), ""] if shard else [""]:
        own = [module for module in model.get_submodule(path).modules() if module not in taken]
        taken.update(own)
        named = [(m, m.named_parameters(recurse=False, remove_duplicate=False)) for m in own]
        plan.append((path, [(m, name) for m, parameters in named for name, _ in parameters]))
    filled: dict[Tensor, nn.Parameter] = {}
    for path, parameters in plan:
        if isinstance(strategy, FSDPStrategy):
            _check_dtypes(path, {module.get_parameter(name).dtype for module, name in parameters})
        if several_ranks():
            _broadcast(parameters, strategy.root_device, filled)
        if shard is not None:
            unit = shard(model.get_submodule(path))
            if not path:
                return unit
            model.set_submodule(path, unit)
            if path.endswith(".base"):
                # A copy, for the adapter to add to: FSDP's backward hook is on the unit's own
                # output, and an output that is a view would lose it if changed in place.
                unit.register_forward_hook(lambda _module, _args, output: output.clone())
    return model


def _check_dtypes(path: str, dtypes: set[torch.dtype]) -> None:
    """Refuse a unit that FSDP1 cannot join, as of PEFT or of terms after norms in 16 bits."""
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"FSDPStrategy joins the weights of a unit in one data type, and those of "
            f"{path or 'the model'} are {names}. Set trainer.strategy to ModelParallelStrategy, or "
            "model.dtype to float32."
        )


def _broadcast(
    parameters: list[tuple[nn.Module, str]],
    device: torch.device,
    filled: dict[Tensor, nn.Parameter],
) -> None:
    """Broadcast parameters from rank 0, each once, wherever it stands."""
    for module, name in parameters:
        parameter = module.get_parameter(name)
        if is_packed(parameter):
            continue
        if parameter not in filled:
            if parameter.is_meta:
                values = torch.empty_like(parameter, device=device)
                whole = nn.Parameter(values, parameter.requires_grad)
            else:
                parameter.data = parameter.data.to(device)
                whole = parameter
            dist.broadcast(whole.data, src=0)
            filled[parameter] = filled[whole] = whole
        setattr(module, name, filled[parameter])


def _units(model: nn.Module) -> Iterator[str]:
    """Paths of the units inside the model, inner ones first."""
    for path, block in decoder_layers(model).items():
        inside = [(f"{path}.{name}", module) for name, module in block.named_modules()]
        # A term that is deferred is added outside of its module, so it belongs to its layer.
        adapters = {n: m for n, m in inside if isinstance(m, RoAELinear) and not m.defer}
        yield from (f"{n}.base" for n, m in adapters.items() if not isinstance(m.base, RoAELinear))
        yield from reversed(adapters)  # of adapters around one another, the inner one first
        for name, child in block.named_children():
            if is_norm(child) and any(True for _ in child.parameters()):
                yield f"{path}.{name}"
        yield path


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The members of each outermost list of layers in which something trains, by dotted path."""
    lists = outermost_lists(model, lambda stack: any(p.requires_grad for p in stack.parameters()))
    return {f"{name}.{n}": layer for name, stack in lists.items() for n, layer in enumerate(stack)}


def _shard_function(strategy: Strategy) -> Callable[[nn.Module], nn.Module] | None:
    """What makes a unit of a module, and returns it or its wrapper."""
    if isinstance(strategy, FSDPStrategy):
        from torch.distributed.fsdp.wrap import wrap

        # Types are the base's and the adapters' own, unless the user asks for others.
        options: dict[str, Any] = {"mixed_precision": strategy.mixed_precision}
        return lambda module: wrap(module, auto_wrap_policy=None, **options)
    if isinstance(strategy, ModelParallelStrategy):
        from torch.distributed.fsdp import fully_shard

        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"tensor_parallel_size={mesh['tensor_parallel'].size()}: RoSAModule shards over "
                "the data-parallel processes alone. Set trainer.strategy.init_args."
                "tensor_parallel_size=1 and data_parallel_size to the number of processes."
            )
        return lambda module: cast(nn.Module, fully_shard(module, mesh=mesh["data_parallel"]))
    return None
