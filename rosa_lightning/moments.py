"""What an optimizer remembers of parameters that were frozen for a while.

Pure torch. Moments of a frozen parameter stay as they were, and point where its gradient pointed
then; zeroed, they start over, with the bias correction of a first step.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

Moments = Literal["keep", "reset", "free"]

_FRESH = {
    "step": 0,
    # Adam and its kin: AdamW, NAdam, RAdam, Adamax, Adafactor, Lion.
    "exp_avg": 0,
    "exp_avg_sq": 0,
    "max_exp_avg_sq": 0,
    "exp_inf": 0,
    "mu_product": 1,
    "row_var": 0,
    "col_var": 0,
    "variance": 0,
    # SGD, Muon, RMSprop, Adadelta.
    "momentum_buffer": 0,
    "square_avg": 0,
    "grad_avg": 0,
    "acc_delta": 0,
}
"""The value with which each entry of an optimizer's state begins."""


def check_moments(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Check that the state of these parameters, as far as there is any yet, can be reset.

    Raises:
        ValueError: Names the optimizer and the entry whose first value is not known.
    """
    for optimizer, state in _states(optimizers, parameters):
        unknown = [key for key in state if key not in _FRESH]
        if unknown:
            raise ValueError(
                f"moments='reset' does not know how {unknown[0]!r} begins, which "
                f"{type(optimizer).__name__} remembers. Set moments='keep' or, if it makes its "
                "state at a parameter's first step, moments='free'."
            )


def reset_moments(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Make optimizers forget these parameters, in place, so that all entries stay where they are.

    Sharded checkpoints need the entries.
    """
    for _, state in _states(optimizers, parameters):
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.fill_(_FRESH[key])
            elif value is not None:
                state[key] = _FRESH[key]


def free_moments(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Give back the memory of what optimizers remember of these parameters.

    For optimizers that make a parameter's state at its first step, as almost all do.
    """
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def _states(
    optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
    for optimizer in optimizers:
        for parameter in parameters:
            # Looking up what is not there would make an entry.
            if parameter in optimizer.state:
                yield optimizer, optimizer.state[parameter]
