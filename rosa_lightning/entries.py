"""What a checkpoint must hold for a training to go on from it, checked before any of it is used.

Lightning passes over an entry that is missing, and takes most values as they are: the run would
begin anew in part, or fail steps later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from rosa_lightning.rng import rng_state, set_rng_state

_NEEDED: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_OF_A_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""What optimizers remember of a weight in its shape."""


def check_entries(
    checkpoint: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], names: Collection[str]
) -> None:
    """Check that a training can go on from a checkpoint.

    Args:
        checkpoint: As Lightning loaded it.
        shapes: Of the trained weights, in the optimizer's order; none where they are in shards.
        names: Of all weights.

    Raises:
        ValueError: Names the entry that is missing or holds what it cannot.
    """
    for name, kind in _NEEDED.items():
        if name not in checkpoint:
            raise ValueError(
                f"the checkpoint holds no entry {name}, without which a training cannot go on "
                "(ModelCheckpoint writes it unless save_weights_only is set). Give another "
                "checkpoint, or export this one and begin from it as model.adapter."
            )
        _must(name, checkpoint[name], kind)
        if checkpoint[name] == []:
            raise _damaged(name, "is empty")
    for name in ("epoch", "global_step"):
        _check_count(name, checkpoint[name])
    _check_loops("loops", checkpoint["loops"])
    if "fit_loop" not in checkpoint["loops"]:
        raise _damaged("loops", "holds no fit_loop")
    for name, state in checkpoint["callbacks"].items():
        if str(name).startswith("DynamicLayerSelection"):  # what others keep is for them to say
            _must(f"callbacks.{name}", state, dict)
    for number, state in enumerate(checkpoint["optimizer_states"]):
        _check_groups(f"optimizer_states[{number}]", state)
        _check_moments(f"optimizer_states[{number}].state", state["state"], shapes)
    for number, state in enumerate(checkpoint["lr_schedulers"]):
        _check_schedule(f"lr_schedulers[{number}]", state)
    _check_data(checkpoint.get("ReasoningDataModule", {}))
    _check_own(_must("rosa", checkpoint.get("rosa"), dict), names)


def _check_own(about: Mapping[str, Any], names: Collection[str]) -> None:
    _check_rng(about.get("rng"))
    _check_count("rosa.nonfinite_steps", about.get("nonfinite_steps", 0))
    gradients = about.get("gradients")
    if gradients is None:
        return
    if len(_must("rosa.gradients", gradients, list)) != len(about["rng"]):
        raise _damaged("rosa.gradients", f"holds {len(gradients)} of {len(about['rng'])} ranks")
    for own in gradients:
        for name, value in _must("rosa.gradients", own, dict).items():
            if name not in names or not isinstance(value, Tensor):
                raise _damaged("rosa.gradients", f"holds {name}, which is no gradient of a weight")


def _check_schedule(name: str, state: Any) -> None:
    _must(name, state, dict)
    if "last_epoch" in state:
        _check_count(f"{name}.last_epoch", state["last_epoch"])
    for rate in _must(f"{name}._last_lr", state.get("_last_lr", []), list):
        _check_number(f"{name}._last_lr", rate)


def _check_rng(states: Any) -> None:
    """Check random states of all ranks, by putting each in place for a moment."""
    own = rng_state()
    try:
        for state in _must("rosa.rng", states, list):
            set_rng_state(_must("rosa.rng", state, dict))
    except Exception as error:  # whatever Python's, NumPy's and torch's generators raise
        raise _damaged("rosa.rng", f"holds no random states ({type(error).__name__})") from error
    finally:
        set_rng_state(own)


def _check_loops(name: str, value: Any) -> None:
    """Counts of batches, epochs and steps: whole numbers, whatever they are called."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_loops(f"{name}.{key}", inner)
    elif ".current." in name or ".total." in name:
        _check_count(name, value)
    elif name.endswith(("progress", ".current", ".total", "state_dict", "_loop")):
        raise _damaged(name, f"is {_short(value)}, and no mapping")


def _check_groups(name: str, state: Any) -> None:
    _must(name, state, dict)
    for key, kind in (("state", dict), ("param_groups", list)):
        if key not in state:
            raise _damaged(name, f"holds no {key}")
        _must(f"{name}.{key}", state[key], kind)
    for group in state["param_groups"]:
        _must(f"{name}.param_groups", group, dict)
        _check_number(f"{name}.param_groups.lr", group.get("lr"))


def _check_moments(name: str, state: Any, shapes: Sequence[tuple[int, ...]]) -> None:
    kept = {key for own in state.values() if isinstance(own, dict) for key in own}
    for number, own in state.items():
        missing = kept & set(_OF_A_WEIGHT) - _must(f"{name}.{number}", own, dict).keys()
        if own and missing:
            raise _damaged(f"{name}.{number}", f"lacks {min(missing)}, which others have")
        known = isinstance(number, int) and number < len(shapes)  # those in shards go by name
        for key in _OF_A_WEIGHT if known else ():
            value = own.get(key)
            if value is None:
                continue
            shape = tuple(_must(f"{name}.{number}.{key}", value, Tensor).shape)
            if shape not in ((), shapes[number]):
                raise _damaged(
                    f"{name}.{number}.{key}", f"has shape {shape}, and the weight {shapes[number]}"
                )


def _check_data(state: Any) -> None:
    name = "ReasoningDataModule"
    _must(name, state, dict)
    for key, count in _must(f"{name}.seen", state.get("seen", {}), dict).items():
        _check_count(f"{name}.seen.{key}", count)
    _must(f"{name}.order", state.get("order", {}), dict)
    for training in _must(f"{name}.trained_on", state.get("trained_on", []), list):
        _must(f"{name}.trained_on", training, dict)
    if state and not {"seen", "order"} <= state.keys():
        raise _damaged(name, "lacks seen or order")


def _must(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _damaged(name, f"is {_short(value)}, and no {kind.__name__}")
    return value


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise _damaged(name, f"is {_short(value)}, and no count")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float | Tensor) or isinstance(value, bool):
        raise _damaged(name, f"is {_short(value)}, and no number")


def _damaged(name: str, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint's entry {name} {reason}: it is damaged, or of another kind of run. Give "
        "another checkpoint as ckpt_path."
    )


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) < 60 else f"{shown[:57]}..."
