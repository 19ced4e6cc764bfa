"""What a checkpoint must hold for a training to go on from it, checked before any of it is used.

Lightning passes over an entry that is missing, and takes most values as they are: the run would
begin anew in part, or fail steps later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from rosa_lightning.utils.rng import rng_state, set_rng_state

_NEEDED: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_DATA = "ReasoningDataModule"
_OF_A_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""What optimizers remember of a weight in its shape."""


def check_entries(
    checkpoint: Mapping[str, Any],
    trainer: Trainer,
    shapes: Sequence[tuple[int, ...]],
    names: Collection[str],
) -> None:
    """Check that a training can go on from a checkpoint.

    Args:
        checkpoint: As Lightning loaded it.
        trainer: Of the run that is to go on; it need not have its optimizers yet.
        shapes: Of the trained weights, in the optimizer's order; none where they are in shards.
        names: Of all weights.

    Raises:
        ValueError: Names the entry that is missing or holds what it cannot.
    """
    in_shards = trainer.ckpt_path is not None and Path(trainer.ckpt_path).is_dir()
    for name, kind in _NEEDED.items():
        if in_shards and name == "optimizer_states":
            continue  # the strategy has taken them from the shards
        if name not in checkpoint:
            raise ValueError(
                f"the checkpoint holds no entry {name}, without which a training cannot go on "
                "(ModelCheckpoint writes it unless save_weights_only is set). Give another "
                "checkpoint, or export this one and begin from it as model.adapter."
            )
        _must(name, checkpoint[name], kind)
    for name in ("epoch", "global_step"):
        _check_count(name, checkpoint[name])
    _check_loops("loops", checkpoint["loops"], {"fit_loop": trainer.fit_loop.state_dict()})
    _check_steps(checkpoint["global_step"], checkpoint["loops"]["fit_loop"])
    for name, state in checkpoint["callbacks"].items():
        # What others keep is for them to say.
        ours = str(name).startswith("DynamicLayerSelection")
        if ours and not _must(f"callbacks.{name}", state, dict):
            raise _damaged(f"callbacks.{name}", "is empty")
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        _check_groups(f"optimizer_states[{number}]", state)
        _check_moments(f"optimizer_states[{number}].state", state["state"], shapes)
    for number, state in enumerate(checkpoint["lr_schedulers"]):
        _check_schedule(f"lr_schedulers[{number}]", state)
    if type(trainer.datamodule).__qualname__ == _DATA or _DATA in checkpoint:  # type: ignore[attr-defined]
        _check_data(checkpoint.get(_DATA))
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


def _check_loops(name: str, value: Any, fresh: Any) -> None:
    """Counts of batches, epochs and steps: all that a loop that has yet to run holds."""
    if isinstance(fresh, dict):
        _must(name, value, dict)
        for key in () if name.endswith("state_dict") else fresh:  # what is there may be left out
            if key not in value:
                raise _damaged(name, f"lacks {key}")
            _check_loops(f"{name}.{key}", value[key], fresh[key])
    elif isinstance(fresh, bool):
        if not isinstance(value, bool):
            raise _damaged(name, f"is {_short(value)}, and neither true nor false")
    else:
        _check_count(name, value)


def _check_steps(steps: int, loop: Mapping[str, Any]) -> None:
    """Steps that Lightning takes itself, or that a module takes; it counts either."""
    own = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    manual = loop["epoch_loop.manual_optimization.optim_step_progress"]
    counted = own["total"]["completed"] + manual["total"]["completed"]
    if steps != counted:
        raise _damaged("global_step", f"is {steps}, and loops.fit_loop has counted {counted}")


def check_states_fit(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Check the states of optimizers and schedules against those that they are restored to.

    Args:
        checkpoint: One that `check_entries` has passed.
        trainer: With the run's optimizers.

    Raises:
        ValueError: Names the entry that lacks something or holds what it cannot.
    """
    optimizers = trainer.optimizers
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for name, own in (("optimizer_states", optimizers), ("lr_schedulers", schedulers)):
        if len(checkpoint[name]) != len(own):
            raise _damaged(name, f"holds {len(checkpoint[name])} states, and the run {len(own)}")
    steps = checkpoint["global_step"] - checkpoint["rosa"].get("nonfinite_steps", 0)
    if "MixedPrecision" in checkpoint:
        steps = 0  # a scaler leaves steps out that are counted
    for number, optimizer in enumerate(optimizers):
        name, state = f"optimizer_states[{number}]", checkpoint["optimizer_states"][number]
        groups = zip(state["param_groups"], optimizer.param_groups, strict=False)
        for group, fresh in groups:
            for key in group.keys() & fresh.keys():
                _check_kind(f"{name}.param_groups.{key}", group[key], fresh[key])
        if steps > 0 and not state["state"] and _remembers(optimizer):
            raise _damaged(f"{name}.state", f"is empty after {steps} steps")
    for number, scheduler in enumerate(schedulers):
        missing = {"last_epoch", "_last_lr"} & scheduler.state_dict().keys()
        missing -= checkpoint["lr_schedulers"][number].keys()
        if missing:
            raise _damaged(f"lr_schedulers[{number}]", f"lacks {min(missing)}")


def _check_kind(name: str, value: Any, fresh: Any) -> None:
    """A number for a number, and as many values for a pair."""
    if isinstance(fresh, int | float) and not isinstance(fresh, bool):
        _check_number(name, value)
    elif isinstance(fresh, tuple) and (
        not isinstance(value, tuple | list) or len(value) != len(fresh)
    ):
        raise _damaged(name, f"is {_short(value)}, and not {len(fresh)} values")


def _remembers(optimizer: Optimizer) -> bool:
    """Whether it is known to keep something of each step."""
    if isinstance(optimizer, SGD):
        return any(group["momentum"] for group in optimizer.param_groups)
    return type(optimizer).__module__.startswith("torch.optim")


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
    _must(_DATA, state, dict)
    if not {"seen", "order"} <= state.keys():
        raise _damaged(_DATA, "lacks seen or order")
    sources = _must(f"{_DATA}.order", state["order"], dict).get("sources", {})
    for key, count in _must(f"{_DATA}.seen", state["seen"], dict).items():
        _check_count(f"{_DATA}.seen.{key}", count)
    if missing := _must(f"{_DATA}.order.sources", sources, dict).keys() - state["seen"].keys():
        raise _damaged(f"{_DATA}.seen", f"lacks {min(missing)}")
    for training in _must(f"{_DATA}.trained_on", state.get("trained_on", []), list):
        _must(f"{_DATA}.trained_on", training, dict)


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
