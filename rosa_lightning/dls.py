"""Dynamic Layer Selection: every few optimizer steps, choose which layers train.

The callback keeps time, freezes and thaws parameters and keeps the state; `selection.py` makes
the decision. It knows nothing of language models or adapters: it selects among whatever trains
inside the repeated layers of a LightningModule.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from rosa_lightning.layers import Layer, find_layers
from rosa_lightning.scores import layer_scores
from rosa_lightning.selection import Policy, resolve_indices, resolve_num_active, select_layers


class DynamicLayerSelection(Callback):
    """Trains only the layers whose norm weights have the largest gradients, chosen anew at times.

    Every `interval` optimizer steps one step runs with the gradients of all layers. From those of
    the norm weights, accumulated over the micro-batches of that step, each layer gets a score; a
    policy selects the active layers; the gradients of all others are dropped before the optimizer
    sees them. Until the next selection the others neither move nor take gradients, and autograd
    stops below the lowest active layer. When the fit ends, however it ends, every parameter
    requires a gradient or not as it did before.

    The optimizer must hold the parameters of all layers from the start. Compile layers one by one
    (`layer.compile()`): a model compiled as a whole is compiled again for every new selection, and
    runs uncompiled once torch's recompile limit (8) is reached.
    """

    # Of one fit; empty outside it.
    _layers: Sequence[Layer] = ()
    _found: Sequence[tuple[nn.Parameter, bool]] = ()
    _probes: Sequence[nn.Parameter] = ()
    _scoring: bool = False
    _warned: bool = False
    # A checkpoint's state, until training starts.
    _pending: dict[str, Any] | None = None
    # What the arguments mean for this model.
    _names: tuple[str, ...] = ()
    _positions: tuple[int, ...] = ()
    _count: int = 0
    _always: tuple[int, ...] = ()
    _fixed: tuple[int, ...] = ()
    # What a checkpoint keeps.
    _active: tuple[int, ...]
    _scores: tuple[float, ...] | None
    _num_selections: int
    _counts: list[int]
    _generator: torch.Generator

    def __init__(
        self,
        *,
        num_active: int | float = 0.5,
        interval: int = 100,
        policy: Policy = "top_k",
        temperature: float = 1.0,
        warmup_steps: int = 0,
        layers: str | None = None,
        norms: str | None = None,
        trainable: str | None = None,
        always_active: list[int] | None = None,
        fixed_layers: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Check what can be checked without a model.

        Args:
            num_active: Layers that train at a time: a count, or a fraction in (0, 1] of all.
            interval: Optimizer steps from one selection to the next.
            policy: top_k takes the highest scores; sample draws without replacement in proportion
                to score**(1/temperature); random, all and fixed are controls that ignore scores.
            temperature: For sample: below 1 nearer to top_k, above 1 nearer to random.
            warmup_steps: Optimizer steps at the start in which all layers train.
            layers: Dotted path of the ModuleList of layers; by default the only outermost one.
            norms: Pattern such as "*layernorm" on module names inside a layer, several separated
                by commas: the norms that score it. By default its direct children.
            trainable: Pattern such as "*lora*" on parameter names inside a layer, several
                separated by commas: what is frozen and trained. By default all that trains.
            always_active: Layers that always train; they count towards num_active. Negative
                indices count from the last layer.
            fixed_layers: For fixed: the layers that train.
            seed: Seed of the callback's own random generator, for sample and random.
        """
        super().__init__()
        resolve_num_active(num_active)
        _check_arguments(interval, policy, temperature, warmup_steps, fixed_layers)
        self.num_active = num_active
        self.interval = interval
        self.policy = policy
        self.temperature = temperature
        self.warmup_steps = warmup_steps
        self.layers = layers
        self.norms = norms
        self.trainable = trainable
        self.always_active = list(always_active or [])
        self.fixed_layers = list(fixed_layers or [])
        self.seed = seed
        self._start_afresh()

    @property
    def active(self) -> tuple[int, ...]:
        """Positions of the layers that train; all candidates until the first selection."""
        return tuple(self._positions[index] for index in self._active)

    @property
    def scores(self) -> tuple[float, ...] | None:
        """Each candidate layer's score at the last selection; None before the first."""
        return self._scores

    @property
    def num_layers(self) -> int:
        """Number of layers selected among, those with something to train; 0 before a fit."""
        return len(self._names)

    @property
    def num_selections(self) -> int:
        """Selections made so far in this run."""
        return self._num_selections

    @property
    def selection_counts(self) -> tuple[int, ...]:
        """How often each layer was selected so far in this run."""
        return tuple(self._counts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported, before anything is built."""
        if stage == "fit" and trainer.world_size > 1:
            raise ValueError(
                f"DynamicLayerSelection does not support distributed runs yet, given "
                f"{trainer.world_size} processes. Set trainer.devices and trainer.num_nodes to 1."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and remember what trains."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually; DynamicLayerSelection needs "
                "automatic_optimization=True: one optimizer, and training_step returns the loss."
            )
        self._layers = find_layers(pl_module, self.layers, self.norms, self.trainable)
        self._names = tuple(layer.name for layer in self._layers)
        self._positions = tuple(layer.index for layer in self._layers)
        self._resolve_arguments()
        norms = [norm for layer in self._layers for norm in layer.norms]
        self._probes = [norm for norm in norms if not norm.requires_grad]
        touched = {*norms, *(p for layer in self._layers for p in layer.candidates.values())}
        self._found = [(parameter, parameter.requires_grad) for parameter in touched]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer and start afresh, or where the checkpoint stopped."""
        # Not earlier: strategies differ in when they load callbacks, model and optimizer.
        state, self._pending = self._pending, None
        self._check_optimizers(trainer.optimizers)
        self._start_afresh()
        # Without a path the state was loaded for another purpose, a validation before this fit.
        if state is not None and trainer.ckpt_path is not None:
            self._resume(state)
        self._freeze_inactive()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first micro-batch of a scoring step, let all layers take gradients."""
        opens_window = batch_idx % trainer.accumulate_grad_batches == 0
        if self._is_due(trainer.global_step) and (opens_window or not self._scoring):
            self._scoring = True
            for layer in self._layers:
                _require_grad([*layer.candidates.values(), *layer.norms])
                # Norms outside the optimizer are zeroed by nobody else.
                _drop_grad(layer.norms)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last micro-batch of a scoring step, select."""
        if self._scoring and not trainer.fit_loop._should_accumulate():
            self._select(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Select also where the last micro-batch had no loss, and so no backward."""
        if self._scoring:
            self._select(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as found."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the model as found, in the middle of a scoring step too."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as found."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to select as if it had never stopped."""
        if self._pending is not None:
            return self._pending
        if not self._names:
            return {}
        return {
            "layers": list(self._names),
            "active": list(self._active),
            "scores": None if self._scores is None else list(self._scores),
            "num_selections": self._num_selections,
            "selection_counts": list(self._counts),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._pending = dict(state_dict)

    def _is_due(self, step: int) -> bool:
        past = step - self.warmup_steps
        # Without any selection yet (a fit that starts late, a first score that was not finite)
        # the next step scores, whatever the interval.
        return past >= 0 and (past % self.interval == 0 or self._num_selections == 0)

    def _select(self, trainer: Trainer) -> None:
        """The one place of a decision, where several processes would have to agree."""
        self._scoring = False
        gradients = [[norm.grad for norm in layer.norms] for layer in self._layers]
        # The gradients are of this process: with several, average them over ranks here.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scores = layer_scores(gradients, 1.0 if scaler is None else scaler.get_scale())
        reached = any(gradient is not None for layer in gradients for gradient in layer)
        if reached and bool(scores.isfinite().all()):
            # The choice is of this process: with several, broadcast it from rank 0 here.
            self._active = select_layers(
                self.policy,
                scores,
                self._count,
                generator=self._generator,
                temperature=self.temperature,
                always_active=self._always,
                fixed_layers=self._fixed,
            )
            self._scores = tuple(scores.tolist())
            self._num_selections += 1
            for index in self._active:
                self._counts[index] += 1
            self._log(trainer)
        elif not self._warned:
            self._warned = True
            problem = "are not finite" if reached else "are missing: no norm weight got a gradient"
            rank_zero_warn(
                f"Layer scores at step {trainer.global_step} {problem}; the active layers stay as "
                "they were. This is said once."
            )
        self._freeze_inactive()

    def _freeze_inactive(self) -> None:
        for norm in self._probes:
            norm.requires_grad_(False)
            norm.grad = None
        for index, layer in enumerate(self._layers):
            parameters = layer.candidates.values()
            if index in self._active:
                _require_grad(parameters)
            else:
                # None, not zero: AdamW still moves a weight whose gradient is zero.
                _drop_grad(parameters)
                for parameter in parameters:
                    parameter.requires_grad_(False)

    def _restore(self) -> None:
        for parameter, required_grad in self._found:
            parameter.requires_grad_(required_grad)
            if not required_grad:
                parameter.grad = None
        self._layers, self._found, self._probes = (), (), ()
        self._scoring = False

    def _start_afresh(self) -> None:
        self._scoring = False
        self._warned = False
        self._active = tuple(range(self.num_layers))
        self._scores = None
        self._num_selections = 0
        self._counts = [0] * self.num_layers
        self._generator = torch.Generator().manual_seed(self.seed)

    def _resume(self, state: dict[str, Any]) -> None:
        if list(state["layers"]) != list(self._names):
            saved, own = state["layers"], self._names
            raise ValueError(
                f"The checkpoint selects among {len(saved)} layers, {saved[0]} to {saved[-1]}; "
                f"this model has {len(own)}, {own[0]} to {own[-1]}. Resume with the model and "
                "layers= that wrote it."
            )
        self._active = tuple(state["active"])
        self._scores = None if state["scores"] is None else tuple(state["scores"])
        self._num_selections = state["num_selections"]
        self._counts = list(state["selection_counts"])
        self._generator.set_state(state["generator"].cpu())

    def _resolve_arguments(self) -> None:
        self._count = resolve_num_active(self.num_active, self.num_layers)
        self._always = resolve_indices("always_active", self.always_active, self._positions)
        self._fixed = resolve_indices("fixed_layers", self.fixed_layers, self._positions)
        if len(self._always) > self._count and self.policy not in ("all", "fixed"):
            raise ValueError(
                f"always_active={self.always_active} holds more layers than num_active="
                f"{self.num_active} lets train ({self._count}). Raise num_active or shorten it."
            )

    def _check_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
            raise ValueError(
                "LBFGS moves parameters that have no gradient, so layers cannot be frozen under "
                "it. Use a first-order optimizer such as AdamW."
            )
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = {parameter for group in groups for parameter in group["params"]}
        candidates = {n: p for layer in self._layers for n, p in layer.candidates.items()}
        missing = [name for name, parameter in candidates.items() if parameter not in held]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"The optimizer lacks {', '.join(missing[:3])}{more}. Build it over all parameters "
                "that require a gradient before fit, so that every layer can be selected."
            )

    def _log(self, trainer: Trainer) -> None:
        # Through the loggers: self.log would keep only every log_every_n_steps-th step.
        width = max(2, len(str(self._positions[-1])))
        metrics: dict[str, float] = {
            "dls/lowest_active": min(self.active),
            "dls/num_active": len(self.active),
        }
        for position, score in zip(self._positions, self._scores or (), strict=True):
            metrics[f"dls/score/{position:0{width}d}"] = score
            metrics[f"dls/active/{position:0{width}d}"] = float(position in self.active)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def _require_grad(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def _drop_grad(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _check_arguments(
    interval: int,
    policy: str,
    temperature: float,
    warmup_steps: int,
    fixed_layers: list[int] | None,
) -> None:
    if interval < 1:
        raise ValueError(f"interval={interval} is below 1. Set the optimizer steps to wait.")
    if policy not in get_args(Policy):
        raise ValueError(f"policy={policy!r} is unknown. Set one of {', '.join(get_args(Policy))}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} is not above 0. Set 1 for shares by score.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} is below 0. Set 0 to select at once.")
    if (policy == "fixed") != bool(fixed_layers):
        raise ValueError(
            f"policy={policy!r} with fixed_layers={fixed_layers}: policy 'fixed' needs "
            "fixed_layers, and only it reads them. Set both or neither."
        )
