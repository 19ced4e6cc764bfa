"""Dynamic Layer Selection, the callback: every few optimizer steps, choose which layers train.

It freezes and unfreezes parameters and collects gradients; `selector.py` and `policies.py` decide.
It knows nothing of language models or adapters: it selects among whatever trains inside the
repeated layers of a LightningModule.
"""

import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from .checks import (
    check_graph,
    check_module,
    check_optimizers,
    check_published,
    check_sole_owner,
    check_strategy,
    publish_settings,
)
from .layers import Layer, find_layers
from .optimizer_state import (
    OptimizerState,
    fill_state,
    forget_state,
    global_gradients,
    num_elements,
)
from .policies import Policy, layer_scores
from .selector import LayerSelector, PolicyOptions, SelectionConfig, check_settings

_DEFAULT_OPTIONS = PolicyOptions()


class DynamicLayerSelection(Callback):
    """Trains only the layers whose norm weights have the largest gradients, chosen anew at times.

    Pan et al., "RoSA: Enhancing Parameter-Efficient Fine-Tuning via RoPE-aware Selective
    Adaptation in Large Language Models", AAAI-26, https://doi.org/10.1609/aaai.v40i18.38589

    Every `interval` optimizer steps one step runs with the gradients of all layers. Those of the
    norm weights, accumulated over its micro-batches, score the layers; a policy selects the active
    ones. Until the next selection the others neither move nor take gradients, and autograd stops
    below the lowest active layer. After the fit every parameter is frozen or not as before.

    It works on one device, under DDP with find_unused_parameters=True, and under FSDP1 and FSDP2:
    scores are of the global batch, before clipping and free of the loss scale. The optimizer must
    hold the parameters of all layers from the start. Compile layers one by one
    (`layer.compile()`): a model compiled as a whole is compiled again for every new selection.
    """

    # Of one fit; empty outside it.
    _layers: Sequence[Layer] = ()
    _found: Sequence[tuple[nn.Parameter, bool]] = ()
    _probes: Sequence[nn.Parameter] = ()
    _scoring: bool = False
    _ends_window: bool = False
    _checked_graph: bool = False
    _warned: bool = False
    # A checkpoint's state, until training starts.
    _pending: dict[str, Any] | None = None
    # Of the last fit.
    _selector: LayerSelector | None = None
    _step: int = 0
    candidate_layers: tuple[int, ...] = ()
    """Indices of the layers that can be selected, in which something trains; empty before a fit."""
    num_layers: int = 0
    """All layers of the list; 0 before a fit."""

    def __init__(
        self,
        num_active: int | float = 0.5,
        interval: int = 100,
        *,
        policy: Policy = "top_k",
        policy_options: PolicyOptions = _DEFAULT_OPTIONS,
        backward_budget: float = 1.0,
        optimizer_state: OptimizerState = "reset",
        warmup_steps: int = 0,
        final_steps_all: int = 0,
        layers: str | None = None,
        norms: str | None = None,
        trainable: str | None = None,
        seed: int = 0,
    ) -> None:
        """Check what can be checked without a model.

        Args:
            num_active: Layers that train at a time: a count, or a fraction in (0, 1] of all.
            interval: Optimizer steps from one selection to the next.
            policy: top_k takes the highest scores; sample draws without replacement in proportion
                to score**(1/temperature); threshold takes the fewest layers that hold score_share
                of the total score; random and fixed are controls that ignore scores; all trains
                every layer, as without selection, unless there is a backward_budget.
            policy_options: What a policy reads besides.
            backward_budget: Mean share of a full backward pass, in layers, that a step of the run
                may cost, in (0, 1]; a step that scores costs a full one. Below 1, scores add up
                while a layer waits: intervals that train low layers alternate with others.
            optimizer_state: What becomes of the optimizer's state of a frozen layer: keep leaves it
                as it is; reset zeroes it when the layer trains again; free gives its memory back
                until then (one device and DDP).
            warmup_steps: Optimizer steps at the start in which all layers train.
            final_steps_all: Optimizer steps at the end of the run in which all layers train.
            layers: Dotted path of the ModuleList of layers, or a pattern that one path matches; by
                default the only outermost one. Two callbacks may select among two lists.
            norms: Pattern such as "*layernorm" on module names inside a layer, several separated
                by commas: the norms that score it. By default its direct children.
            trainable: Pattern such as "*lora*" on parameter names inside a layer, several
                separated by commas: what is frozen and trained. By default all that trains.
            seed: Seed of the callback's own random generator, for sample and random.
        """
        super().__init__()
        self.num_active, self.interval = num_active, interval
        self.policy, self.policy_options = policy, policy_options
        self.backward_budget, self.optimizer_state = backward_budget, optimizer_state
        self.warmup_steps, self.final_steps_all = warmup_steps, final_steps_all
        self.layers, self.norms, self.trainable = layers, norms, trainable
        self.seed = seed
        check_settings(self)
        _ = self.config  # checks them together

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; AttributeError for a setting while a fit runs, which has read it."""
        if self._layers and name in _SETTINGS:
            raise AttributeError(
                f"{name} cannot be changed while a fit runs, which has read it. Set it before."
            )
        super().__setattr__(name, value)

    @property
    def config(self) -> SelectionConfig:
        """How layers are selected in the next fit."""
        names = [field.name for field in fields(SelectionConfig)]
        return SelectionConfig(**{name: getattr(self, name) for name in names})

    @property
    def state_key(self) -> str:
        """Its own for each list of layers, so that a trainer may hold one callback for each."""
        name = type(self).__qualname__
        return name if self.layers is None else f"{name}{ {'layers': self.layers}!r}"

    @property
    def num_candidates(self) -> int:
        """Number of layers that can be selected; 0 before a fit."""
        return len(self.candidate_layers)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the layers that train; all candidates until the first selection."""
        return self.candidate_layers if self._selector is None else self._selector.active_layers

    @property
    def scores(self) -> tuple[float, ...] | None:
        """Each candidate's score at the last selection, as measured; None before the first."""
        return None if self._selector is None else self._selector.scores

    @property
    def num_selections(self) -> int:
        """Selections made so far in this run."""
        return 0 if self._selector is None else self._selector.num_selections

    @property
    def selection_counts(self) -> tuple[int, ...]:
        """How often each candidate was selected so far in this run."""
        none = (0,) * self.num_candidates
        return none if self._selector is None else self._selector.selection_counts

    @property
    def backward_share(self) -> float:
        """Mean share of a full backward pass, in layers, that a step has cost in this run."""
        return 1.0 if self._selector is None else self._selector.backward_share(self._step)

    @property
    def selects(self) -> bool:
        """Whether layers are selected at all: not under policy all without a budget."""
        return self.policy != "all" or self.backward_budget < 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported, before anything is built."""
        if stage == "fit":
            # Behind the barrier that follows, each rank that has this callback has told its own.
            publish_settings(self.state_key, {name: getattr(self, name) for name in _SETTINGS})
            if self.selects:
                check_strategy(trainer.strategy, frees_state=self.optimizer_state == "free")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the ranks, find the layers and remember what trains."""
        check_published(self.state_key, type(self).__name__)
        self._selector, self.candidate_layers, self.num_layers = None, (), 0
        if not self.selects:
            return
        check_module(pl_module, trainer.strategy.model or pl_module)
        layers = find_layers(pl_module, self.layers, self.norms, self.trainable)
        self.candidate_layers = tuple(layer.index for layer in layers)
        self.num_layers = layers[0].num_layers
        others = [callback for callback in _selections(trainer) if callback is not self]
        check_sole_owner(layers, [layer for other in others for layer in other._layers])
        norms = [norm for layer in layers for norm in layer.norms]
        self._probes = [norm for norm in norms if not norm.requires_grad]
        touched = {*norms, *(p for layer in layers for p in layer.candidates.values())}
        self._found = [(parameter, parameter.requires_grad) for parameter in touched]
        self._scoring = self._checked_graph = self._warned = False
        self._layers = layers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer and start afresh, or where the checkpoint stopped."""
        # Not earlier: strategies differ in when they load callbacks, model and optimizer.
        state, self._pending = self._pending, None
        if not self._layers:
            return
        candidates = {n: p for layer in self._layers for n, p in layer.candidates.items()}
        check_optimizers(trainer.optimizers, candidates, self.optimizer_state == "keep")
        if trainer.ckpt_path is None:  # the state was loaded for a validation before this fit
            state = None
        self._step = trainer.global_step
        first_step = self._step if state is None else state["first_step"]
        needs_length = self.final_steps_all > 0 or self.backward_budget < 1
        total = total_optimizer_steps(trainer) if needs_length else math.inf
        sizes = num_elements([layer.norms for layer in self._layers], *_wrapped(trainer))
        self._selector = LayerSelector(self.config, self._layers, sizes, total, first_step)
        if state is not None:
            self._selector.load_state_dict(state)
        self._apply(self._selector, self._selector.active, trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a scoring step, let all layers and their norms take gradients."""
        if not self._layers or self._selector is None:
            return
        selector, step = self._selector, trainer.global_step
        window, count = trainer.accumulate_grad_batches, batch_idx + 1
        last = trainer.is_last_batch or count >= trainer.num_training_batches
        self._ends_window = last or count % window == 0
        previous = selector.active
        if selector.activate_all(step):
            self._apply(selector, previous, trainer)
            self._log(selector, trainer)
        if selector.is_due(step) and (batch_idx % window == 0 or not self._scoring):
            self._scoring = True
            for norm in (norm for layer in self._layers for norm in layer.norms):
                norm.grad = None  # those outside the optimizer are zeroed by nobody else
        if self._scoring:
            for layer in self._layers:
                layer.set_active(True)
            for norm in self._probes:
                norm.requires_grad_(True)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Refuse a loss that the active layers have no part in, before autograd does."""
        if not self._layers:
            return
        if not loss.requires_grad:
            raise ValueError(
                f"The active layers {list(self.active)} took no part in this loss, and nothing "
                "else trains. Set always_active (or fixed_layers) to layers that every forward "
                "pass runs through, or enable checkpointing with use_reentrant=False."
            )
        if not self._checked_graph:
            self._checked_graph = True
            check_graph(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last micro-batch of a scoring step, select."""
        if self._scoring:
            # Between micro-batches too, where a checkpoint may be saved.
            for norm in self._probes:
                norm.requires_grad_(False)
            if self._ends_window:
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
        self._step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as found."""
        for parameter, required_grad in self._found:
            parameter.requires_grad_(required_grad)
            if not required_grad:
                parameter.grad = None
        self._layers, self._found, self._probes = (), (), ()
        self._scoring = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the model as found."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as found, where no training came of the fit."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to select as if it had never stopped."""
        if self._pending is not None:
            return self._pending
        return {} if self._selector is None else self._selector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._pending = dict(state_dict)

    def _select(self, trainer: Trainer) -> None:
        """The one place of a decision: all ranks score the same batch and take rank 0's choice."""
        self._scoring = False
        assert self._selector is not None, "training goes on"
        selector, step, before = self._selector, trainer.global_step, self.num_selections
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
            rank_zero_warn(f"Layer scores at step {step} {problem}; no other layers are selected.")
        self._apply(selector, previous, trainer)

    def _apply(self, selector: LayerSelector, previous: Collection[int], trainer: Trainer) -> None:
        """Freeze and unfreeze, and treat what optimizers remember of layers that were frozen."""
        for index, layer in enumerate(self._layers):
            active = index in selector.active
            layer.set_active(active)
            frees = self.optimizer_state == "free" and not active
            resets = self.optimizer_state == "reset" and active and index not in previous
            if frees or resets:
                forget_state(trainer.optimizers, layer.candidates.values())
        for norm in self._probes:
            norm.requires_grad_(False)
            norm.grad = None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            for optimizer in trainer.optimizers:
                fill_state(optimizer)

    def _log(self, selector: LayerSelector, trainer: Trainer) -> None:
        # After "train" and "val" in the alphabet, by which logger pages are sorted. The first
        # callback's tags are those of the dashboard and the report.
        first = _selections(trainer)[0] is self
        path = "" if first else f"{self._layers[0].name.rpartition('.')[0]}/"
        metrics = selector.metrics(trainer.global_step)
        # Through the loggers: self.log would keep only every log_every_n_steps-th step.
        for logger in trainer.loggers:
            tagged = {f"weights/{path}{name}": value for name, value in metrics.items()}
            logger.log_metrics(tagged, step=trainer.global_step)


_SETTINGS = [*inspect.signature(DynamicLayerSelection).parameters]


def total_optimizer_steps(trainer: Trainer) -> float:
    """The optimizer step at which the trainer will stop; infinite where it cannot know.

    Lightning's own estimate takes the accumulation of the moment for that of all epochs.
    """
    total: float = trainer.estimated_stepping_batches
    if total < 0:
        return math.inf
    batches = trainer.num_training_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    # Without a number of epochs or of batches only max_steps can end the run.
    if scheduler is None or trainer.max_epochs in (None, -1) or math.isinf(batches):
        return total
    windows = (scheduler.get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs))
    steps = sum(math.ceil(batches / window) for window in windows)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def _selections(trainer: Trainer) -> list[DynamicLayerSelection]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, DynamicLayerSelection)]


def _wrapped(trainer: Trainer) -> tuple[nn.Module, torch.device]:
    """The model as the strategy wrapped it, and where ranks can exchange tensors."""
    model = trainer.strategy.model
    assert model is not None, "training goes on"
    return model, trainer.strategy.root_device
