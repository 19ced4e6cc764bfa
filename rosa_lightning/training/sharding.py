"""An adapted base under a strategy of several processes: loaded once, sent to all, sharded.

Rank 0 loads. All others get the model with its parameters on the meta device, and then, unit by
unit, their values, so that no rank but the first ever holds more of the base than its shard and
one unit. A unit is what FSDP gathers at a time.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rosa_lightning.models.quantization import is_packed
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.utils.agreement import mark_told, several_ranks

T = TypeVar("T")

SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's folder that holds all but the tensors; Lightning's name."""


def is_sharded(strategy: Strategy | None) -> bool:
    """Whether a strategy keeps the parameters in shards."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def raise_together(error: Exception | None) -> None:
    """Raise what has gone wrong on any rank, on every rank; each of them must call this.

    Raises:
        Exception: The first rank's error.
    """
    errors: list[Exception | None] = [error]
    if several_ranks():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            mark_told(found)
            raise found from (error if error is not None and found is not error else None)


def load_once(load: Callable[[], T], strategy: Strategy | None) -> T:
    """What `load` returns, called on rank 0 alone; elsewhere its parameters are on meta.

    Where it cannot be sent (packed weights, classes of code that came with a base), every rank
    loads.

    Raises:
        Exception: Whatever `load` raised, on every rank.
    """
    if strategy is None or not several_ranks():
        return load()
    loaded: T | None = None
    message: bytes | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            loaded = load()
            message = _without_values(loaded)
        except Exception as failure:
            error = failure
    message, error = strategy.broadcast((message, error))
    if error is not None:
        raise error
    if dist.get_rank() == 0:
        return cast(T, loaded)
    return load() if message is None else cast(T, pickle.loads(message))


class _Pickler(pickle.Pickler):
    """Leaves the values of parameters out; what is shared stays shared."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            if is_packed(obj):
                raise pickle.PicklingError("a packed weight is more than its values")
            return _empty, (obj.shape, obj.dtype, obj.requires_grad)
        return NotImplemented


def _empty(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad)


def _without_values(value: object) -> bytes | None:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return buffer.getvalue()


def spread(model: nn.Module, strategy: Strategy | None) -> nn.Module:
    """Give every rank the values of rank 0, and shard the model where the strategy shards.

    Adapters are units of their own: FSDP joins or reduces the weights of a unit in one data type,
    and theirs is float32 whatever the base's. So are the norms of a layer, or scoring would take
    room for gradients of the whole base under FSDP1.

    Args:
        model: As `load_once` gave it, adapted.
        strategy: The trainer's, if there is one.

    Returns:
        The model, which FSDP1 stands around.

    Raises:
        ValueError: Tensor parallelism, or shards of a quantised base, which nothing here can do.
    """
    if strategy is None:
        return model
    _check_unpacked(model, strategy)
    shard = _shard_function(strategy)
    device = strategy.root_device
    # What belongs to which unit must be known before a wrapper stands in between.
    plan: list[tuple[str, list[tuple[nn.Module, str]]]] = []
    taken: set[nn.Module] = set()
    for path in [*_units(model), ""] if shard else [""]:
        own = [module for module in model.get_submodule(path).modules() if module not in taken]
        taken.update(own)
        plan.append((path, [(module, name) for module in own for name in module._parameters]))
    filled: dict[Tensor, nn.Parameter] = {}
    for path, parameters in plan:
        if several_ranks():
            _send(parameters, device, filled)
        if shard is not None:
            unit = shard(model.get_submodule(path))
            if not path:
                return unit
            model.set_submodule(path, unit)
            if path.endswith(".base"):
                unit.register_forward_hook(_copy)
    return model


def _check_unpacked(model: nn.Module, strategy: Strategy) -> None:
    """Refuse shards of packed weights."""
    packed = [name for name, weight in model.named_parameters() if is_packed(weight)]
    if packed and is_sharded(strategy):
        raise ValueError(
            f"{strategy.__class__.__name__} cannot shard a quantised base ({packed[0]}). Set "
            "trainer.strategy to ddp, or leave model.quantization out."
        )


def leave_packed_out(module: nn.Module) -> None:
    """Keep packed weights out of what `DistributedDataParallel` sends round at its start.

    It cannot send them, and every rank has loaded its own.
    """
    packed = [name for name, weight in module.named_parameters() if is_packed(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        module, packed
    )


def _copy(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A copy, for the adapter to add to: FSDP's backward hook is on the unit's own output.

    Changed in place, an output that is a view would lose that hook, and the backward pass would
    find the unit's weights gone.
    """
    return output.clone()


def _send(
    parameters: list[tuple[nn.Module, str]],
    device: torch.device,
    filled: dict[Tensor, nn.Parameter],
) -> None:
    """Broadcast parameters from rank 0, each once, wherever it stands."""
    for module, name in parameters:
        parameter = module._parameters[name]
        if parameter is None or is_packed(parameter):
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
        module._parameters[name] = filled[parameter]


def _units(model: nn.Module) -> Iterator[str]:
    """Paths of the units inside the model, inner ones first."""
    for path in decoder_layers(model):
        block = model.get_submodule(path)
        adapters = [
            (f"{path}.{n}", m) for n, m in block.named_modules() if isinstance(m, RoAELinear)
        ]
        yield from (f"{name}.base" for name, m in adapters if not isinstance(m.base, RoAELinear))
        # Of adapters around one another, the inner one first.
        yield from (name for name, _ in reversed(adapters))
        yield from (f"{path}.{name}" for name, m in block.named_children() if _is_norm(m))
        yield path


def decoder_layers(model: nn.Module) -> Iterator[str]:
    """Paths of the decoder layers: the members of each outermost list that holds an adapter."""
    lists: list[str] = []
    for name, module in model.named_modules():
        outer = any(name.startswith(f"{path}.") for path in lists)
        adapted = any(isinstance(inner, RoAELinear) for inner in module.modules())
        if isinstance(module, nn.ModuleList) and adapted and not outer:
            lists.append(name)
            yield from (f"{name}.{index}" for index in range(len(module)))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters())


def _shard_function(strategy: Strategy) -> Callable[[nn.Module], nn.Module] | None:
    """What makes a unit of a module, and returns it or what stands around it."""
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


def clip(model: nn.Module, value: float, algorithm: str | None) -> bool:
    """Clip gradients under FSDP1, where Lightning cannot; False elsewhere.

    Args:
        model: As `spread` returned it.
        value: Largest norm of all gradients, or largest size of each entry.
        algorithm: ``norm`` (also None) or ``value``.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        return False
    if algorithm == "value":
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-value, value)
    else:
        model.clip_grad_norm_(value)
    return True
