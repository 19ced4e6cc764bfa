"""Products of frozen weights in bfloat16 on a CPU, where autocast casts too much.

Autocast casts a frozen weight in each pass, and holds the cast of each for the backward pass; it
casts what several projections read (the input of Q, K and V, and of RoAE's A) once for each, and
adds their gradients in float32. Here one function computes all products of one input, and a weight
is cast once, until it changes. Which projections read the same tensor is seen in a short run of the
model.

Axes: M tokens of all rows, D input width, R ranks of all terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rosa_lightning.models.quantization import is_quantized
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.roae.tracing import is_fake
from rosa_lightning.training.attention import is_half_on_cpu
from rosa_lightning.training.recompute import version
from rosa_lightning.utils.modules import in_mode, replaced

_MOST_TURNED = 2**14
"""Outputs of the widest projection whose cast may lie transposed."""


class HalfProducts:
    """The frozen projections of a model, in groups that read the same input."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Runs the model on some arguments to see who reads what."""
        terms = {
            module.base: module for module in model.modules() if isinstance(module, RoAELinear)
        }
        self._groups = [_Group(found, terms) for found in _readers(model, *args, **kwargs)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, projections that are frozen run so, where products are in bfloat16."""
        with ExitStack() as stack:
            for group in self._groups:
                group.replace(stack)
            yield


@torch.no_grad()
def _readers(model: nn.Module, *args: Any, **kwargs: Any) -> list[list[nn.Linear]]:
    """Frozen linear layers by what they read; those that do not run on the arguments in none."""
    read: dict[int, tuple[Tensor, list[nn.Linear]]] = {}
    known: set[nn.Module] = set()

    def look(module: nn.Linear, given: tuple[Any, ...]) -> None:
        if len(given) == 1 and module not in known:
            known.add(module)
            # The tensors are held, so that no number stands for two.
            read.setdefault(id(given[0]), (given[0], []))[1].append(module)

    with ExitStack() as stack:
        stack.enter_context(in_mode(model, False))
        for module in filter(_is_frozen, model.modules()):
            stack.enter_context(module.register_forward_pre_hook(look))
        model(*args, **kwargs)
    return [found for _, found in read.values()]


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer that does not train."""
    if type(module) is not nn.Linear or is_quantized(module) or not module.weight.numel():
        return False
    return not any(weight.requires_grad for weight in module.parameters())


class _Group:
    """Projections of one input, the first of which computes all."""

    def __init__(self, modules: list[nn.Linear], terms: dict[nn.Module, RoAELinear]) -> None:
        self.modules = modules
        self.terms = [terms[module] for module in modules if module in terms]
        self.halves: dict[nn.Linear, _Half] = {}
        self.given: Tensor | None = None
        self.made: dict[nn.Module, Tensor] = {}

    def replace(self, stack: ExitStack) -> None:
        """Let the modules run so within a stack, as long as they are frozen."""
        stack.callback(self._forget)
        if not all(_is_frozen(module) for module in self.modules):
            self.halves.clear()
            return
        held = [(module, self.halves.get(module)) for module in self.modules]
        self.halves = {module: half for module, half in held if half and half.is_of(module.weight)}
        if not torch.is_grad_enabled():  # no step that would need them follows
            stack.callback(self.halves.clear)
        for module in self.modules:
            run = partial(self._result, module, module.forward)
            stack.enter_context(replaced(module, "forward", run))
        for term in self.terms:
            run = partial(self._result, term, term.reduced)
            stack.enter_context(replaced(term, "reduced", run))

    def _result(self, module: nn.Module, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        known = module in self.modules or module in self.terms
        if not known or not is_half_on_cpu(x.device.type, x.dtype):
            return own(x)
        if x is not self.given:
            self._forget()
            self._compute(x)
        if module not in self.made:  # a term with dropout, or a second call
            return own(x)
        result = self.made.pop(module)
        if not self.made:
            self._forget()
        return result

    def _compute(self, x: Tensor) -> None:
        # Without autocast the term is computed in float32.
        in_half = torch.is_autocast_enabled(x.device.type)
        terms = [t for t in self.terms if in_half and not (t.training and t.dropout.p)]
        frozen = [self._half(module) for module in self.modules]
        factors = [term.roae_A for term in terms]
        found = _Products.apply(x, frozen, *factors)  # type: ignore[no-untyped-call]
        self.given, self.made = x, dict(zip([*self.modules, *terms], found, strict=True))

    def _half(self, module: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in bfloat16."""
        bias = None if module.bias is None else module.bias.detach().bfloat16()
        if module.weight.dtype == torch.bfloat16:
            return module.weight, bias
        if module not in self.halves:
            self.halves[module] = _Half(module.weight)
        return self.halves[module].values, bias

    def _forget(self) -> None:
        """Compute no more beforehand what nobody asked for, as of a block that reads fewer rows."""
        self.modules = [module for module in self.modules if module not in self.made]
        self.terms = [term for term in self.terms if term not in self.made]
        self.given, self.made = None, {}


class _Half:
    """A weight in bfloat16, held from step to step.

    In memory so that the product with the wider output, forward or backward, reads it row by row:
    where outputs are not in the cache the other order takes up to 1.4 times as long (oneDNN 3.12,
    AMX). Not so of very wide ones, such as heads, which gain little: there oneDNN divides by zero,
    which ends the process, in products of 32 rows over 49,152 columns of a transposed matrix, and
    in others of 1.5 * 2**20 numbers in at most 32 rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self._made_of = None if is_fake(weight) else _marks(weight)
        with torch.inference_mode(False):  # whose tensors no backward pass takes
            half = weight.detach().bfloat16()
            turns = half.shape[1] < len(half) <= _MOST_TURNED
            self.values = half.T.contiguous().T if turns else half.contiguous()

    def is_of(self, weight: Tensor) -> bool:
        """Whether a weight is what it was, as far as its marks tell."""
        if self._made_of is None:
            return True
        known, now = self._made_of, _marks(weight)
        return known[0] == now[0] and all(map(torch.equal, known[1], now[1]))


def _marks(weight: Tensor) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What tells of a change: place and version, and for ``.data``, which has none, some numbers.

    Of each row and of each column one: merges and pruning change whole ones.
    """
    where = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, version(weight)
    middle = [size // 2 for size in weight.shape]
    bare = weight.detach()
    return where, [bare[:, middle[1]].clone(), bare[middle[0]].clone()]


class _Products(torch.autograd.Function):
    """Products of one input with frozen weights, and with A of some terms."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: list[tuple[Tensor, Tensor | None]], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        x_MD = x.reshape(-1, x.shape[-1]).bfloat16()
        out = [_linear(x_MD, x.shape[:-1], *pair) for pair in frozen]
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*out)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.sizes = [len(factor) for factor in factors]
        weights = [weight for weight, _ in frozen]
        if not factors:
            ctx.save_for_backward(*weights)
            return tuple(out)
        A_RD = torch.cat(factors).bfloat16()
        ctx.save_for_backward(*weights, x_MD, A_RD)
        ctx.dtypes = [factor.dtype for factor in factors]
        parts_MR = torch.split(x_MD @ A_RD.T, ctx.sizes, -1)
        # No views, which could not be changed in place.
        return *out, *(part.reshape(*x.shape[:-1], -1).clone() for part in parts_MR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        number = len(grads) - len(ctx.sizes)
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        weights = ctx.saved_tensors[:number]
        both = zip(flat[:number], weights, strict=True)
        pairs = [(grad, weight) for grad, weight in both if grad is not None]
        of_factors: list[Any] = []
        if ctx.sizes:
            x_MD, A_RD = ctx.saved_tensors[number:]
            grad_MR = torch.cat(
                [
                    x_MD.new_zeros(len(x_MD), size) if grad is None else grad
                    for grad, size in zip(flat[number:], ctx.sizes, strict=True)
                ],
                dim=-1,
            )
            pairs.append((grad_MR, A_RD))
            parts = torch.split(grad_MR.T @ x_MD, ctx.sizes)
            of_factors = [part.to(d) for part, d in zip(parts, ctx.dtypes, strict=True)]
        of_x = _sum_of_products(pairs) if ctx.needs_input_grad[0] else None
        return None if of_x is None else of_x.view(ctx.shape).to(ctx.dtype), None, *of_factors


def _linear(x_MD: Tensor, lead: torch.Size, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product, shape (*lead, rows), as a tensor of its own, which may be changed in place."""
    out = x_MD.new_empty(*lead, len(weight))
    flat = out.view(-1, len(weight))
    if bias is None:
        torch.mm(x_MD, weight.T, out=flat)
    else:
        torch.addmm(bias, x_MD, weight.T, out=flat)
    return out


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    total: Tensor | None = None
    for grad, weight in pairs:
        total = grad @ weight if total is None else torch.addmm(total, grad, weight, out=total)
    return total
