"""Runs a model on two tokens and records which modules attend, and with which projections.

Whichever module passes queries and keys on is an attention module, whatever its name or its parts'
names. Nearly all models pass them to the attention interface of `transformers`; the others multiply
them by hand, which a torch function mode sees. Models without weights run too.

Internals of `transformers` (read in 5.24): ``AttentionInterface.get_interface``,
``masking_utils.eager_mask``, and the ``_attn_implementation`` and ``sub_configs`` of its configs.
Of torch 2.13: ``_subclasses.fake_tensor``, ``utils._python_dispatch``, ``utils._pytree``,
and the operators ``_grouped_mm`` and ``_to_copy``.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rosa_lightning.utils.modules import in_mode, replaced, replaced_tensors
from rosa_lightning.utils.text import one_line

_PROBE = "rosa_probe"
_MATMULS = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
    *(torch.baddbmm, Tensor.baddbmm),
)


@contextmanager
def intercept_attention(
    module: nn.Module, attend: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Let every attention module inside call ``attend`` instead of a kernel.

    ``attend`` takes the module, queries, keys and values, (N, H, T, D); it returns (N, T, H, D).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return attend(module, query, key, value), query.new_zeros(*query.shape[:3], key.shape[2])

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, eager_mask)
    before = [(config, config._attn_implementation) for config in _configs(module)]
    for config, _ in before:
        config._attn_implementation = _PROBE
    try:
        yield
    finally:
        # The setter reaches down into sub-configs, which stand later in the list.
        for config, value in before:
            config._attn_implementation = value


def _configs(module: nn.Module) -> list[Any]:
    """All configurations held inside a module that name an attention kernel, outer ones first."""
    waiting = [part.config for part in module.modules() if hasattr(part, "config")]
    found: list[Any] = []
    while waiting:
        config = waiting.pop(0)
        if hasattr(config, "_attn_implementation") and not any(config is one for one in found):
            found.append(config)
            names = getattr(config, "sub_configs", {})
            waiting += [getattr(config, name) for name in names if hasattr(config, name)]
    return found


@contextmanager
def watch_attention(see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with queries and keys on their way to any attention kernel, which then runs."""
    from transformers import AttentionInterface

    find = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        attend = find(self, *args, **kwargs)

        def watched(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
            see(query, key)
            return attend(module, query, key, *rest, **more)

        return watched

    with replaced(AttentionInterface, "get_interface", get_interface):
        yield


class MatmulTracer(TorchFunctionMode):
    """Sees queries multiplied with keys, and attention scores with values, in plain products.

    Where ``num_tokens`` is the size of a head as well, scores and values look alike, and
    ``on_scores`` is called for both.
    """

    def __init__(
        self,
        on_scores: Callable[[Tensor, Tensor], None],
        on_values: Callable[[Tensor], None],
        num_tokens: int = 2,
    ) -> None:
        super().__init__()
        self.on_scores, self.on_values, self.num_tokens = on_scores, on_values, num_tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands of a product, then compute it."""
        tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        if func is F.scaled_dot_product_attention:
            self.on_scores(tensors[0], tensors[1])
            self.on_values(tensors[2])
        elif func in _MATMULS and len(tensors) >= 2:
            # The last two: the first of baddbmm's three is what the product is added to.
            self._look(*tensors[-2:])
        return func(*args, **(kwargs or {}))

    def _look(self, left: Tensor, right: Tensor) -> None:
        """Scores are (..., T, D) times (..., D, T); then come (..., T, T) times values."""
        outer = zip(left.shape[:-2], right.shape[:-2], strict=False)
        if left.ndim < 3 or left.ndim != right.ndim or any(a != b and b != 1 for a, b in outer):
            return
        if left.shape[-2] == right.shape[-1] == self.num_tokens:
            self.on_scores(left, right.transpose(-1, -2))
        elif left.shape[-2:] == (self.num_tokens, self.num_tokens):
            self.on_values(right)


@dataclass(frozen=True)
class Leaf:
    """One call of a module without children."""

    path: str
    module: nn.Module
    given: Tensor
    output: Tensor

    @property
    def is_projection(self) -> bool:
        """Whether the module maps the last axis with a matrix: a linear layer by any name."""
        weight = getattr(self.module, "weight", None)
        matrix = isinstance(weight, Tensor) and weight.ndim == 2
        # A quantised one may hold its matrix in parts that have other names.
        return (matrix or _is_linear(self.module)) and self.given.is_floating_point()


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "out_features")


@dataclass(frozen=True)
class AttentionCall:
    """One attention module, what it was called with, and the projections it called."""

    path: str
    module: nn.Module
    by_interface: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    projections: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the projections called before queries met keys, by dotted path."""
    output: str | None = None
    """The last projection called after that."""

    @property
    def num_rows(self) -> int:
        """R, all output rows of the projections."""
        return sum(output.shape[-1] for output in self.projections.values())

    @property
    def hidden_states(self) -> Tensor:
        """The hidden states among the arguments."""
        given = (self.kwargs.get("hidden_states"), *self.args, *self.kwargs.values())
        for value in given:
            if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
                return value
        raise ValueError("it is called without hidden states of shape (batch, tokens, width).")


@dataclass(frozen=True)
class Trace:
    """What a run on two tokens showed."""

    attentions: tuple[AttentionCall, ...]
    leaves: tuple[Leaf, ...]
    """Calls of modules without children, in order."""

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each leaf, by dotted path."""
        return {leaf.path: (leaf.given.shape[-1], leaf.output.shape[-1]) for leaf in self.leaves}


@torch.no_grad()
def trace(model: nn.Module) -> Trace:
    """Run two tokens through a language model and find its attention modules."""
    recorder = _Recorder(model)
    tracer = MatmulTracer(lambda *_: recorder.multiply(), lambda _: None)
    with recorder.hooks(), intercept_attention(model, recorder.attend), tracer:
        _run_two_tokens(model)
    attentions = recorder.attentions()
    if not all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
        attentions = _with_float32_rotation(model, attentions)
    return Trace(attentions, tuple(recorder.leaves))


def _run_two_tokens(model: nn.Module) -> None:
    # Not both can be padding, whose embedding may be zero and tells nothing apart.
    ids = torch.tensor([[1, 2]], device=next(model.parameters()).device)
    try:
        with in_mode(model, training=False):
            model(input_ids=ids, use_cache=False)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run on two token ids, so its attention cannot be "
            f"measured: {type(error).__name__}: {one_line(error, 200)}"
        ) from error


class _Recorder:
    """Keeps the calls of all modules, and in which of them queries meet keys."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.leaves: list[Leaf] = []
        # Each attention module with the number of leaves called before its queries met keys.
        self.at_interface: dict[nn.Module, int] = {}
        self.by_hand: dict[nn.Module, int] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.at_interface.setdefault(module, len(self.leaves))
        return _no_attention(module, query, key, value)

    def multiply(self) -> None:
        if self.stack:
            self.by_hand.setdefault(self.stack[-1], len(self.leaves))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.paths:
                enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.enter_context(enter)
                leave = module.register_forward_hook(self._leave, with_kwargs=True)
                stack.enter_context(leave)
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(module)
        self.calls.setdefault(module, (args, kwargs))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop()
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if given is not None and isinstance(output, Tensor) and not any(module.children()):
            self.leaves.append(Leaf(self.paths[module], module, given, output))

    def attentions(self) -> tuple[AttentionCall, ...]:
        """The modules seen at the interface; only where there are none, those seen multiplying."""
        modules = {path: module for module, path in self.paths.items()}
        found = {}
        for module, moment in (self.at_interface or self.by_hand).items():
            path = self.paths[module]
            # The nearest module around it that holds a projection.
            while path and not any(_is_part(leaf, path) for leaf in self.leaves):
                path = path.rpartition(".")[0]
            before = [leaf for leaf in self.leaves[:moment] if _is_part(leaf, path)]
            after = [leaf for leaf in self.leaves[moment:] if _is_part(leaf, path)]
            found[path] = AttentionCall(
                path,
                modules[path],
                bool(self.at_interface),
                *self.calls[modules[path]],
                projections={leaf.path: leaf.output for leaf in before},
                output=after[-1].path if after else None,
            )
        return tuple(found.values())


def _is_part(leaf: Leaf, path: str) -> bool:
    """Whether a projection lies below a module."""
    return is_inside(leaf.path, path) and leaf.is_projection


def _no_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1])


def is_inside(path: str, parent: str) -> bool:
    """Whether one dotted path lies below another."""
    return not parent or path.startswith(f"{parent}.")


def _with_float32_rotation(
    model: nn.Module, attentions: tuple[AttentionCall, ...]
) -> tuple[AttentionCall, ...]:
    """The calls of a second run, whose rotary modules answer in float32, and no other.

    A half-precision cosine cannot tell the slowest pairs apart.
    """
    precise = dict.fromkeys(call.module for call in attentions)

    def to_float32(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), torch.float32)

    def keep(call: AttentionCall) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            seen = replace(call, args=args, kwargs=kwargs)
            precise[module] = precise[module] or seen
            return _cast((args, kwargs), seen.hidden_states.dtype)

        return hook

    hooks = [(module, to_float32) for module in model.modules() if _is_rotary(module)]
    hooks += [(call.module, keep(call)) for call in attentions]
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        stack.enter_context(intercept_attention(model, _no_attention))
        _run_two_tokens(model)
    return tuple(precise[call.module] or call for call in attentions)


def _is_rotary(module: nn.Module) -> bool:
    """A rotary module holds frequencies: a floating buffer, no weights and no children."""
    has_parts = any(True for _ in (*module.children(), *module.parameters()))
    floats = any(buffer.is_floating_point() for buffer in module.buffers())
    # A quantised linear layer may hold its scales in buffers.
    return floats and not has_parts and not _is_linear(module)


def _cast(values: Any, dtype: torch.dtype | None, device: str | None = None) -> Any:
    """Cast all floating tensors in nested containers, and move all tensors."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return tree_map_only(Tensor, cast, values)


# Models without their weights: on the meta device, or as fake tensors.

_ATEN = torch.ops.aten
_PRODUCTS = {
    *(_ATEN.mm, _ATEN.addmm, _ATEN.mv, _ATEN.addmv, _ATEN.bmm, _ATEN.baddbmm, _ATEN._grouped_mm),
    *(_ATEN.convolution, _ATEN.embedding),
}
_COPIES = {_ATEN._to_copy, _ATEN.clone, _ATEN.index, _ATEN.index_select}


@contextmanager
def run_on_meta(model: nn.Module) -> Iterator[None]:
    """Let a model whose parameters are on the meta device run on the CPU, without gradients.

    Each such parameter becomes one number expanded to its shape, which takes no memory. Products
    with it are random numbers, no two alike. ValueError for a buffer on the meta device.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield
        return
    lost = next((name for name, buffer in model.named_buffers() if buffer.is_meta), None)
    if lost is not None:
        raise ValueError(
            f"{type(model).__name__}: buffer {lost} is on the meta device, so its rotation cannot "
            "be read. Make the model with load_skeleton, which computes its buffers."
        )
    mode = _RandomProducts()
    with replaced_tensors(model, mode.parameter), mode:
        yield


class _RandomProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces meta parameters; products with them are random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(0)
        self.numbers: dict[torch.dtype, Tensor] = {}

    def parameter(self, tensor: Tensor) -> Tensor:
        return nn.Parameter(self.like(tensor), requires_grad=False) if tensor.is_meta else tensor

    def like(self, tensor: Tensor) -> Tensor:
        one = self.numbers.setdefault(tensor.dtype, torch.ones((), dtype=tensor.dtype))
        return one.expand(tensor.shape)

    def is_replacement(self, tensor: Tensor) -> bool:
        one = self.numbers.get(tensor.dtype)
        return one is not None and (
            tensor.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if kind not in _PRODUCTS | _COPIES:
            return func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        replacement = next((value for value in given if self.is_replacement(value)), None)
        if replacement is None:
            return func(*args, **kwargs)
        # Some products are declared for bfloat16 alone.
        dtype = None if kind in _COPIES else torch.bfloat16
        args, kwargs = _cast((args, kwargs), dtype, "meta")
        result = func(*args, **kwargs)
        if kind in _COPIES:
            return self.like(result)
        return torch.empty(result.shape, dtype=replacement.dtype).normal_(generator=self.generator)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Compute shapes and data types alone; new tensors hold no numbers."""
    # It logs a traceback of every error, even of those that are handled.
    logger = logging.getLogger(fake_tensor.__name__)
    disabled, logger.disabled = logger.disabled, True
    try:
        with fake_tensor.FakeTensorMode(), _GroupedProducts():  # type: ignore[no-untyped-call]
            yield
    finally:
        logger.disabled = disabled


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor holds no numbers."""
    return tensor.is_meta or isinstance(tensor, fake_tensor.FakeTensor)


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of experts in any data type and width; torch has few of them for fake tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket == _ATEN._grouped_mm:
            rows_ND, experts_EDF = args[:2]
            if (rows_ND.ndim, experts_EDF.ndim) == (2, 3):
                return rows_ND.new_empty(rows_ND.shape[0], experts_EDF.shape[2])
        return func(*args, **(kwargs or {}))
