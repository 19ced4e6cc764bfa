"""Dynamic Layer Selection: every few optimizer steps, choose which layers train.

The callback freezes and thaws parameters and scores layers; `selector.py` decides and remembers.
It knows nothing of language models or adapters: it selects among whatever trains inside the
repeated layers of a LightningModule.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rosa_lightning.dls.checks import (
    check_module,
    check_optimizers,
    check_reached,
    check_resumed,
    check_sole_owner,
    check_strategy,
    check_wrapped,
)
from rosa_lightning.dls.gradients import (
    drop_grad,
    freeze,
    global_gradients,
    num_elements,
    require_grad,
)
from rosa_lightning.dls.layers import Layer, find_layers
from rosa_lightning.dls.length import planned_steps
from rosa_lightning.dls.optimizer_state import (
    Moments,
    check_moments,
    fill_optimizer_state,
    free_moments,
    reset_moments,
)
from rosa_lightning.dls.policies import Policy
from rosa_lightning.dls.rules import SelectionRules, check_choice, check_type, layer_indices
from rosa_lightning.dls.scores import Normalization, layer_scores
from rosa_lightning.dls.selector import Selector
from rosa_lightning.utils.agreement import compare_told, settings_of, several_ranks, tell

_RULES = frozenset(field.name for field in fields(SelectionRules))
_READ_AT_START = frozenset({"rules", "moments", "layers", "norms", "trainable"})


class DynamicLayerSelection(Callback):
    """Trains only the layers whose norm weights have the largest gradients, chosen anew at times.

    Every `interval` optimizer steps one step runs with the gradients of all layers. From those of
    the norm weights, accumulated over the micro-batches of that step, each layer gets a score; a
    policy selects the active layers; the gradients of all others are dropped before the optimizer
    sees them. Until the next selection the others neither move nor take gradients, and autograd
    stops below the lowest active layer. When the fit ends, however it ends, every parameter
    requires a gradient or not as it did before.

    It works on one device, under DDP with find_unused_parameters=True, and under FSDP in both forms
    (`FSDPStrategy`, `ModelParallelStrategy`): scores are of the global batch, before clipping and
    free of the loss scale, and all ranks take the choice of the first.

    The optimizer must hold the parameters of all layers from the start. What requires a gradient
    then is selected among; what another callback unfreezes later trains at every step. Compile
    layers one by one (`layer.compile()`): a model compiled as a whole is compiled again for every
    new selection, and runs uncompiled once torch's recompile limit (8) is reached.
    """

    # Of one fit; empty outside it.
    _layers: Sequence[Layer] = ()
    _found: Sequence[tuple[nn.Parameter, bool]] = ()
    _probes: Sequence[nn.Parameter] = ()
    _scoring: bool = False
    _warned: bool = False
    # A checkpoint's state, until training starts.
    _pending: dict[str, Any] | None = None
    # Of the last fit.
    _names: tuple[str, ...] = ()
    _positions: tuple[int, ...] = ()
    _num_blocks: int = 0
    _selector: Selector | None = None
    _steps: int = 0

    def __init__(
        self,
        *,
        num_active: int | float = 0.5,
        interval: int = 100,
        policy: Policy = "top_k",
        temperature: float = 1.0,
        score_share: float = 0.5,
        score_smoothing: float = 0.0,
        score_normalization: Normalization = "none",
        backward_budget: float = 1.0,
        moments: Moments = "reset",
        warmup_steps: int = 0,
        final_steps_all: int = 0,
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
                to score**(1/temperature); threshold takes the fewest layers that hold score_share
                of the total score; random, all and fixed are controls that ignore scores.
            temperature: For sample: below 1 nearer to top_k, above 1 nearer to random.
            score_share: For threshold, which does not read num_active: a share in (0, 1].
            score_smoothing: Weight of earlier selections in a score, in [0, 1): a moving average
                with its bias corrected. 0 takes each score as it is.
            score_normalization: Divides a layer's score by the square root of the number of its
                norm weights (sqrt_size), by the mean of its scores so far (running_mean), or by
                nothing (none).
            backward_budget: Mean share of a full backward pass that a step of the run may cost, in
                (0, 1]; a step costs the layers from the top to the lowest active one, and all in
                a step that scores. Below 1, scores add up while a layer waits: intervals that
                train low layers alternate with intervals that save for them.
            moments: What becomes of an optimizer's moments of a frozen layer: keep leaves them as
                they are; reset zeroes them when the layer trains again; free gives their memory
                back until then (one device and DDP).
            warmup_steps: Optimizer steps at the start in which all layers train.
            final_steps_all: Optimizer steps at the end of the run in which all layers train.
            layers: Dotted path of the ModuleList of layers, or a pattern that one path matches; by
                default the only outermost one. Two callbacks may select among two lists.
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
        self.rules = SelectionRules(
            num_active=num_active,
            interval=interval,
            policy=policy,
            temperature=temperature,
            score_share=score_share,
            score_smoothing=score_smoothing,
            score_normalization=score_normalization,
            backward_budget=backward_budget,
            warmup_steps=warmup_steps,
            final_steps_all=final_steps_all,
            always_active=layer_indices("always_active", always_active),
            fixed_layers=layer_indices("fixed_layers", fixed_layers),
            seed=seed,
        )
        check_choice("moments", moments, get_args(Moments))
        for name, path in (("layers", layers), ("norms", norms), ("trainable", trainable)):
            if path is not None:
                check_type(name, path, str, "a dotted path or pattern, as text")
        self.moments = moments
        self.layers = layers
        self.norms = norms
        self.trainable = trainable

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            AttributeError: It is a setting, which `rules` holds, or one that a fit that runs has
                read already.
        """
        if name in _RULES:
            raise AttributeError(
                f"{name} cannot be set on its own. Set rules = dataclasses.replace(rules, "
                f"{name}={value!r}) before a fit, or make a new DynamicLayerSelection."
            )
        if name in _READ_AT_START and self._layers:
            raise AttributeError(
                f"{name} cannot be changed while a fit runs, which has read it. Set it before."
            )
        super().__setattr__(name, value)

    @property
    def state_key(self) -> str:
        """Its own for each list of layers, so that a trainer may hold one callback for each."""
        own = self.layers is not None
        return self._generate_state_key(layers=self.layers) if own else super().state_key

    @property
    def active(self) -> tuple[int, ...]:
        """Positions of the layers that train; all candidates until the first selection."""
        if self._selector is None:
            return self._positions
        return tuple(self._positions[index] for index in self._selector.active)

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions, in the list of blocks, of the layers selected among; empty before a fit."""
        return self._positions

    @property
    def num_blocks(self) -> int:
        """Length of the list of blocks, those with nothing to train included; 0 before a fit."""
        return self._num_blocks

    @property
    def scores(self) -> tuple[float, ...] | None:
        """Each candidate layer's score at the last selection; None before the first.

        As measured: before smoothing and normalization.
        """
        return None if self._selector is None else self._selector.scores

    @property
    def num_layers(self) -> int:
        """Number of layers selected among, those with something to train; 0 before a fit."""
        return len(self._names)

    @property
    def num_selections(self) -> int:
        """Selections made so far in this run."""
        return 0 if self._selector is None else self._selector.num_selections

    @property
    def selection_counts(self) -> tuple[int, ...]:
        """How often each layer was selected so far in this run."""
        return (0,) * self.num_layers if self._selector is None else tuple(self._selector.counts)

    @property
    def backward_share(self) -> float:
        """Mean share of a full backward pass that a step has cost so far in this run.

        Counted in layers that the backward passes through.
        """
        return 1.0 if self._selector is None else self._selector.backward_share(self._steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported, before anything is built."""
        if stage == "fit":
            check_strategy(trainer.strategy, frees_state=self.moments == "free")
            if several_ranks():
                # Behind the barrier that follows, each rank that has this callback has told so.
                name = type(self).__name__
                settings = {f"{name}.{key}": value for key, value in settings_of(self).items()}
                tell(f"rosa/{self.state_key}", {name: "given", **settings})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the ranks, find the layers and remember what trains."""
        if several_ranks():
            compare_told(f"rosa/{self.state_key}", {type(self).__name__: "missing"})
        check_module(pl_module)
        check_wrapped(trainer.strategy.model or pl_module)
        self._layers = find_layers(pl_module, self.layers, self.norms, self.trainable)
        self.rules.fit(self._layers)
        check_sole_owner(self._layers, [c._layers for c in _selections(trainer) if c is not self])
        self._names = tuple(layer.name for layer in self._layers)
        self._positions = tuple(layer.index for layer in self._layers)
        self._num_blocks = self._layers[0].index + self._layers[0].num_above + 1
        norms = [norm for layer in self._layers for norm in layer.norms]
        self._probes = [norm for norm in norms if not norm.requires_grad]
        touched = {*norms, *(p for layer in self._layers for p in layer.candidates.values())}
        self._found = [(parameter, parameter.requires_grad) for parameter in touched]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer and start afresh, or where the checkpoint stopped."""
        # Not earlier: strategies differ in when they load callbacks, model and optimizer.
        state, self._pending = self._pending, None
        candidates = {n: p for layer in self._layers for n, p in layer.candidates.items()}
        check_optimizers(trainer.optimizers, candidates)
        check_moments(self.moments, trainer.optimizers, list(candidates.values()))
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for optimizer in trainer.optimizers:
                fill_optimizer_state(optimizer)
        # Without a path the state was loaded for another purpose, a validation before this fit.
        state = state if trainer.ckpt_path is not None else None
        first_step = trainer.global_step if state is None else state["first_step"]
        total = planned_steps(trainer) if self.rules.needs_length else math.inf
        sizes = num_elements([layer.norms for layer in self._layers], *_wrapped(trainer))
        self._selector = self.rules.selector(self._layers, sizes, total, first_step)
        self._scoring = self._warned = False
        self._steps = trainer.global_step
        if state is not None:
            check_resumed(state["layers"], self._names)
            self._selector.load_state_dict(state)
        self._freeze_inactive(self._selector)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a scoring step, let all layers and their norms take gradients."""
        selector, step = self._running(), trainer.global_step
        opens_window = batch_idx % trainer.accumulate_grad_batches == 0
        previous = selector.active
        if selector.activate_all(step):
            self._apply(selector, previous, trainer)
            self._log(selector, trainer)
        if selector.is_due(step) and (opens_window or not self._scoring):
            self._scoring = True
            for layer in self._layers:
                # Norms outside the optimizer are zeroed by nobody else.
                drop_grad(layer.norms)
        if self._scoring:
            for layer in self._layers:
                require_grad([*layer.candidates.values(), *layer.norms], True)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Refuse a loss that the active layers have no part in, before autograd does."""
        if len(self.active) < self.num_layers:
            check_reached(loss, self.active)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last micro-batch of a scoring step, select."""
        if self._scoring:
            # Between micro-batches too, where a checkpoint may be saved.
            require_grad(self._probes, False)
            if not trainer.fit_loop._should_accumulate():
                self._select(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Select also where the last micro-batch had no loss, and so no backward."""
        if self._scoring:
            self._select(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember how far the run has come."""
        self._steps = trainer.global_step

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
        if self._selector is None:
            return {}
        return {"layers": list(self._names), **self._selector.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._pending = dict(state_dict)

    def _running(self) -> Selector:
        assert self._selector is not None, "training goes on"
        return self._selector

    def _select(self, trainer: Trainer) -> None:
        """The one place of a decision: all ranks score the same batch and take rank 0's choice."""
        self._scoring = False
        selector, step, before = self._running(), trainer.global_step, self.num_selections
        gradients = global_gradients([layer.norms for layer in self._layers], *_wrapped(trainer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scores = layer_scores(gradients, 1.0 if scaler is None else scaler.get_scale())
        reached = any(gradient is not None for layer in gradients for gradient in layer)
        previous = selector.active
        if reached and bool(scores.isfinite().all()):
            selector.select(scores, step)
        else:
            selector.keep(step)
        # Ranks with other layers would wait for each other forever.
        selector.load_state_dict(trainer.strategy.broadcast(selector.state_dict()))
        if selector.num_selections > before:
            self._log(selector, trainer)
        elif not self._warned:
            self._warned = True
            problem = "are not finite" if reached else "are missing: no norm weight got a gradient"
            rank_zero_warn(
                f"Layer scores at step {step} {problem}; the active layers stay as they were. "
                "This is said once."
            )
        self._apply(selector, previous, trainer)

    def _apply(self, selector: Selector, previous: Sequence[int], trainer: Trainer) -> None:
        """Freeze and thaw, and treat what optimizers remember of layers that were frozen."""
        optimizers = trainer.optimizers
        every = [p for layer in self._layers for p in layer.candidates.values()]
        check_moments(self.moments, optimizers, every)
        for index, layer in enumerate(self._layers):
            parameters = list(layer.candidates.values())
            if self.moments == "free" and index not in selector.active:
                free_moments(optimizers, parameters)
            if self.moments == "reset" and index in set(selector.active) - set(previous):
                reset_moments(optimizers, parameters)
        self._freeze_inactive(selector)

    def _freeze_inactive(self, selector: Selector) -> None:
        freeze(self._probes)
        for index, layer in enumerate(self._layers):
            if index in selector.active:
                require_grad(layer.candidates.values(), True)
            else:
                freeze(layer.candidates.values())

    def _restore(self) -> None:
        for parameter, required_grad in self._found:
            parameter.requires_grad_(required_grad)
            if not required_grad:
                parameter.grad = None
        self._layers, self._found, self._probes = (), (), ()
        self._scoring = False

    def _log(self, selector: Selector, trainer: Trainer) -> None:
        # The first callback's tags are those of the dashboard and the report.
        first = _selections(trainer)[0] is self
        start = "dls/" if first else f"dls/{self._names[0].rpartition('.')[0]}/"
        metrics = selector.metrics(self._positions, trainer.global_step)
        # Through the loggers: self.log would keep only every log_every_n_steps-th step.
        for logger in trainer.loggers:
            tagged = {f"{start}{name}": value for name, value in metrics.items()}
            logger.log_metrics(tagged, step=trainer.global_step)


def _selections(trainer: Trainer) -> list[DynamicLayerSelection]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, DynamicLayerSelection)]


def _wrapped(trainer: Trainer) -> tuple[nn.Module, torch.device]:
    """The model as the strategy wrapped it, and where ranks can exchange tensors."""
    model = trainer.strategy.model
    assert model is not None, "training goes on"
    return model, trainer.strategy.root_device
