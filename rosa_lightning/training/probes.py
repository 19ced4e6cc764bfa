"""Whether another way to run a model gives its logits and gradients, tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_lightning.training.head import close
from rosa_lightning.utils.text import one_line

_HALF = 0.1
"""Bound on relative differences in 16 bits: another way uses other kernels."""


class RefusedError(ValueError):
    """Says by itself why a model cannot be run in some way."""


def difference(
    model: nn.Module,
    run: Callable[[], Tensor],
    wanted: Tensor,
    *,
    to: str,
    where: str,
    gradients: bool = False,
) -> str:
    """How the logits of a way to run a model differ from the wanted ones; empty if they do not.

    Args:
        model: The model.
        run: Gives the logits.
        wanted: Those of the same tokens by the model's own forward, of equal shape.
        to: What the model cannot do if that raises, such as ``run rows apart``.
        where: Where the logits differ, such as ``after a shared prefix``.
        gradients: Compare gradients, too.
    """
    kind = type(model).__name__
    try:
        found = run()
    except RefusedError as error:
        return str(error)
    except Exception as error:
        return f"{kind} cannot {to}: {type(error).__name__}: {one_line(error, 120)}"
    if not close(found, wanted, _HALF):
        return f"{kind} gives other logits {where}"
    if gradients and not _same_gradients(model, found, wanted):
        return f"the gradients of {kind} differ {where}"
    return ""


def _same_gradients(model: nn.Module, found: Tensor, wanted: Tensor) -> bool:
    """Whether two logits of the same tokens have equal gradients of their first entries."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (parameters and wanted.requires_grad and found.requires_grad):
        return wanted.requires_grad == found.requires_grad
    both = []
    for logits in (found, wanted):
        loss = F.log_softmax(logits.float(), -1)[:, 0].sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        both.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    shared, single = (one.to(wanted.dtype) for one in both)
    return shared.shape == single.shape and close(shared, single, _HALF)
