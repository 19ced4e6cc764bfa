"""What a checkpoint must hold for a training to go on from it, checked before any of it is used.

Lightning skips an entry that is missing, and takes most values as they are: the run would begin
anew in part, or fail steps later.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from rosa_lightning.utils.rng import rng_state, set_rng_state
from rosa_lightning.utils.text import one_line

_DATA = "ReasoningDataModule"
_OF_A_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""What optimizers keep of a weight in its shape."""


def check_entries(
    checkpoint: Mapping[str, Any], trainer: Trainer, parameters: Collection[str]
) -> None:
    """Raise ValueError, naming the entry, unless a training can go on from a checkpoint.

    The trainer need not have its optimizers yet; ``parameters`` are the names of the module's.
    """
    loops = {"fit_loop": trainer.fit_loop.state_dict()}
    needed = {"epoch": 0, "global_step": 0, "loops": loops, "callbacks": {}, "lr_schedulers": []}
    if trainer.ckpt_path is None or not Path(trainer.ckpt_path).is_dir():
        needed["optimizer_states"] = []  # else the strategy has taken them from the shards
    for name, like in needed.items():
        if name not in checkpoint:
            raise ValueError(
                f"the checkpoint holds no entry {name}, without which a training cannot go on "
                "(ModelCheckpoint writes it unless save_weights_only is set). Give another "
                "checkpoint, or export this one and begin from it as model.adapter."
            )
        _match(name, checkpoint[name], like)
    _check_steps(checkpoint["global_step"], checkpoint["loops"]["fit_loop"])
    for name, state in checkpoint["callbacks"].items():
        ours = str(name).startswith("DynamicLayerSelection")  # others check theirs
        if ours and not _match(f"callbacks.{name}", state, {}):
            raise _damaged(f"callbacks.{name}", "is empty")
    if type(trainer.datamodule).__qualname__ == _DATA or _DATA in checkpoint:  # type: ignore[attr-defined]
        _check_data(checkpoint.get(_DATA))
    _check_rank_states(checkpoint.get("rosa"), parameters)


def _match(name: str, value: Any, like: Any) -> Any:
    """Check that a value is of the kind of another: the keys of a mapping, the length of a pair.

    A whole number is a count, at least -1. A list is compared with the first item of the other.
    """
    kinds = {float: (int, float, Tensor), tuple: (tuple, list)}.get(type(like), (type(like),))
    if not isinstance(value, kinds) or (isinstance(value, bool) and type(like) is not bool):
        what = "number" if len(kinds) > 2 else kinds[0].__name__
        raise _damaged(name, f"is {one_line(repr(value), 60)}, and no {what}")
    if type(like) is int and value < -1:
        raise _damaged(name, f"is {value}, and no count")
    if type(like) is tuple and len(value) != len(like):
        raise _damaged(name, f"is {one_line(repr(value), 60)}, and not {len(like)} values")
    for key in like if isinstance(like, dict) else ():
        if key in value:
            _match(f"{name}.{key}", value[key], like[key])
        elif not name.endswith("state_dict"):  # these hold what their owner likes
            raise _damaged(name, f"lacks {key}")
    for item in value if isinstance(like, list) and like else ():
        _match(name, item, like[0])
    return value


def _check_steps(steps: int, loop: Mapping[str, Any]) -> None:
    """Steps that Lightning takes itself, or that a module takes; it counts either."""
    own = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    manual = loop["epoch_loop.manual_optimization.optim_step_progress"]
    counted = own["total"]["completed"] + manual["total"]["completed"]
    if steps != counted:
        raise _damaged("global_step", f"is {steps}, and loops.fit_loop has counted {counted}")


def _check_data(state: Any) -> None:
    _match(_DATA, state, {"seen": {}, "order": {}})
    sources = _match(f"{_DATA}.order.sources", state["order"].get("sources", {}), {})
    _match(f"{_DATA}.seen", state["seen"], dict.fromkeys([*state["seen"], *sources], 0))
    _match(f"{_DATA}.trained_on", state.get("trained_on", []), [{}])


def _check_rank_states(about: Any, parameters: Collection[str]) -> None:
    """Check random states of all ranks, by putting each in place for a moment, and gradients."""
    _match("rosa", about, {"rng": [{}]})
    own = rng_state()
    try:
        for state in about["rng"]:
            set_rng_state(state)
    except Exception as error:  # whatever Python's, NumPy's and torch's generators raise
        raise _damaged("rosa.rng", f"holds no random states ({type(error).__name__})") from error
    finally:
        set_rng_state(own)
    _match("rosa.nonfinite_steps", about.get("nonfinite_steps", 0), 0)
    if about.get("gradients") is None:
        return
    gradients, ranks = _match("rosa.gradients", about["gradients"], [{}]), len(about["rng"])
    if len(gradients) != ranks:
        raise _damaged("rosa.gradients", f"holds {len(gradients)} of {ranks} ranks")
    for name, value in (item for held in gradients for item in held.items()):
        if name not in parameters or not isinstance(value, Tensor):
            raise _damaged("rosa.gradients", f"holds {name}, which is no gradient of a weight")


def check_states_fit(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Check the states of optimizers and schedules against those that they are restored to.

    The checkpoint is one that `check_entries` has passed.
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
        _match(name, state, {"state": {}, "param_groups": [{}]})
        for group, fresh in zip(state["param_groups"], optimizer.param_groups, strict=False):
            given = {k: v for k, v in fresh.items() if k in group or k == "lr"}
            numbers = {k: float(v) for k, v in given.items() if type(v) in (int, float)}
            pairs = {k: v for k, v in given.items() if isinstance(v, tuple)}
            _match(f"{name}.param_groups", group, {**numbers, **pairs})
        _check_moments(f"{name}.state", state["state"], optimizer)
        if steps > 0 and not state["state"] and _keeps_state(optimizer):
            raise _damaged(f"{name}.state", f"is empty after {steps} steps")
    for number, scheduler in enumerate(schedulers):
        like: dict[str, Any] = {"last_epoch": 0, "_last_lr": [0.0]}
        like = {key: like[key] for key in like if key in scheduler.state_dict()}
        _match(f"lr_schedulers[{number}]", checkpoint["lr_schedulers"][number], like)


def _check_moments(name: str, states: dict[Any, Any], optimizer: Optimizer) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = {key for own in states.values() if isinstance(own, dict) for key in own}
    for number, own in states.items():
        missing = kept & set(_OF_A_WEIGHT) - _match(f"{name}.{number}", own, {}).keys()
        if own and missing:
            raise _damaged(f"{name}.{number}", f"lacks {min(missing)}, which others have")
        for key in own.keys() & set(_OF_A_WEIGHT) if number in range(len(weights)) else ():
            shape = tuple(getattr(own[key], "shape", (None,)))
            if shape not in ((), tuple(weights[number].shape)):
                raise _damaged(f"{name}.{number}.{key}", f"is {one_line(repr(own[key]), 60)}")


def _keeps_state(optimizer: Optimizer) -> bool:
    """Whether it is known to keep something of each step."""
    if isinstance(optimizer, SGD):
        return any(group["momentum"] for group in optimizer.param_groups)
    return type(optimizer).__module__.startswith("torch.optim")


def _damaged(name: str, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint's entry {name} {reason}: it is damaged, or of another kind of run. Give "
        "another checkpoint as ckpt_path."
    )
