"""`RoSAModule`: a frozen RoPE language model with RoAE, as a LightningModule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from rosa_lightning.adapters.checkpoint import CHECKPOINT_KEY, RankState, pack, unpack
from rosa_lightning.adapters.files import load_adapter, read_metadata
from rosa_lightning.adapters.metadata import BaseFingerprint, Conditions, fingerprint
from rosa_lightning.adapters.resume_checks import check_entries, check_states_fit
from rosa_lightning.answering import Answering
from rosa_lightning.data.collators import num_rows
from rosa_lightning.dls.optimizer_state import held_gradients, hold_gradients
from rosa_lightning.evaluation.evaluator import EvaluationConfig
from rosa_lightning.models.finite import check_states, check_weights
from rosa_lightning.models.loading import (
    Dtype,
    enable_checkpointing,
    load_base,
    load_tokenizer,
    vocabulary_size,
    whole_name,
)
from rosa_lightning.models.quantization import Quantization, check_trainable, is_packed
from rosa_lightning.models.vocabulary import num_embeddings
from rosa_lightning.roae.inject import (
    RoAEReport,
    check_adapter_keys,
    expect_adapters_alone,
    inject_roae,
    is_adapter_key,
)
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.training.checkpoint_io import check_outputs, use_atomic_checkpoints
from rosa_lightning.training.compile import compile_layers
from rosa_lightning.training.guard import StepGuard, check_clipping, check_max_nonfinite_steps
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.resume import (
    begin_due_validation,
    due_validation,
    settle_epoch,
    untrained_reason,
)
from rosa_lightning.training.schedule import WarmupCosine, lightning_scheduler
from rosa_lightning.training.sharding import (
    leave_packed_out,
    load_on_rank_zero,
    shard_and_broadcast,
)
from rosa_lightning.training.speed import SpeedConfig
from rosa_lightning.utils.agreement import together
from rosa_lightning.utils.rng import set_rng_state
from rosa_lightning.utils.stopping import Stopping

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_DEFAULT_ROAE = RoAEConfig()
"""This very object stands for settings that were not given; equal ones were."""
_DEFAULT_EVALUATION = EvaluationConfig()
_DEFAULT_SPEED = SpeedConfig()


_BUILD_SETTINGS = frozenset(
    {
        *("base", "revision", "trust_remote_code", "roae", "adapter", "dtype_of_base"),
        *("quantization", "attn_implementation", "gradient_checkpointing"),
    }
)
"""Settings that the model is built with; they cannot change afterwards."""


def default_optimizer(params: Iterable[Any]) -> Optimizer:
    """AdamW without weight decay."""
    return AdamW(params, lr=1e-3, weight_decay=0.0)


def default_lr_scheduler(optimizer: Optimizer) -> LRScheduler:
    """Warm-up over the first 5 % of the steps, then cosine decay to zero."""
    return WarmupCosine(optimizer)


class RoSAModule(Answering):
    """Fine-tunes a frozen RoPE language model through RoAE alone.

    Only the RoAE weights are trained, in float32 under every precision but 64-true. Checkpoints
    hold them and not the base.

    Args:
        base: The causal language model to adapt: hub id, local folder, or ``tiny`` for the
            embedded demonstration model. On the command line a checkpoint or adapter names it too.
        roae: What RoAE adds. With ``adapter``, leave it out or give what the adapter was trained
            with; another dropout will do.
        adapter: Folder of an adapter to go on from, or to evaluate, that ``export`` has written
            with format rosa or peft.
        revision: Branch, tag or commit of the base on the hub.
        dtype: Data type of the frozen base, under every precision of the trainer; ``auto`` is what
            the base says of itself.
        quantization: Quantise the base's linear layers while loading: int8 (torchao, weights
            alone), llm_int8, nf4 or fp4 (bitsandbytes, eight and four bits); by default they stay
            as the base has them. Needs ``pip install 'rosa-lightning[quantization]'``.
        attn_implementation: Attention kernel: eager, sdpa, flash_attention_2, flex_attention; by
            default what `transformers` chooses.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping
            them: less memory, more time.
        speed: What makes a training step faster or smaller; `SpeedConfig`.
        max_new_tokens: Longest answer written by ``test`` and ``predict``, in tokens.
        trust_remote_code: Run Python code that comes with the base. Off unless asked for.
        evaluation: How ``test`` finds and reads answers.

    Attributes:
        make_optimizer: Makes the optimizer from the trainable parameters; AdamW at 1e-3 by default.
        make_lr_scheduler: Makes the learning rate schedule, stepped once an optimizer step;
            `WarmupCosine` by default.
        max_nonfinite_steps: Optimizer steps of a run that are left out, with a warning, where loss
            or gradients are not finite; the next one stops the run. 0 by default.
    """

    def __init__(
        self,
        base: str,
        roae: RoAEConfig = _DEFAULT_ROAE,
        *,
        speed: SpeedConfig = _DEFAULT_SPEED,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 256,
        trust_remote_code: bool = False,
        evaluation: EvaluationConfig = _DEFAULT_EVALUATION,
    ) -> None:
        super().__init__()
        # A checkpoint holds the adapter's weights, so it must not ask for the folder again.
        self.save_hyperparameters(ignore=["roae", "speed", "adapter", "evaluation"])
        # Known from any working folder.
        self.save_hyperparameters({"base": whole_name(base)})
        self.base = base
        self.roae: RoAEConfig = roae
        self.speed: SpeedConfig = speed
        self.adapter = adapter
        self.revision = revision
        self.dtype_of_base = dtype
        self.quantization = quantization
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.trust_remote_code = trust_remote_code
        self.evaluation = evaluation
        self.make_optimizer: OptimizerCallable = default_optimizer
        self.make_lr_scheduler: LRSchedulerCallable = default_lr_scheduler
        self.max_nonfinite_steps = 0
        self.model: PreTrainedModel | None = None
        self.identity: BaseFingerprint | None = None
        self.report: RoAEReport | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._num_embeddings: int | None = None
        self._forward: LossComputer | None = None
        self._guard = StepGuard(0)
        self._to_restore: RankState | None = None
        self._to_fit: Mapping[str, Any] | None = None
        """A checkpoint to compare with the optimizers, once there are some."""
        self._has_trained = False
        self._said_float64 = False
        # Lightning asks of sharded models whether keys may be missing; `load_state_dict` checks.
        self.strict_loading = False
        self.register_load_state_dict_post_hook(expect_adapters_alone)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A setting is checked, and what follows from it follows.

        Raises:
            ValueError: A setting that cannot be used.
            AttributeError: It says how the model is built, and the model is built.
        """
        if name == "max_new_tokens" and value < 1:
            raise ValueError(
                f"max_new_tokens={value} is below 1. Set model.max_new_tokens; 256 is the default."
            )
        if name == "max_nonfinite_steps":
            check_max_nonfinite_steps(value)
        if name in ("roae", "speed") and isinstance(value, Mapping):  # as a checkpoint has it
            value = (RoAEConfig if name == "roae" else SpeedConfig)(**value)
        if name in _BUILD_SETTINGS and name in vars(self) and value != getattr(self, name):
            self._check_unbuilt(name, value)
        if name == "speed" and name in vars(self) and value.compile != self.speed.compile:
            self._check_unbuilt(name, value)
        super().__setattr__(name, value)
        if name == "speed" and vars(self).get("_forward") is not None:
            self._forward = self._new_forward()
        if name in ("roae", "speed"):  # as plain values, which load safely
            plain = asdict(value)
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
            self.save_hyperparameters({name: plain})
        remembered = "dtype" if name == "dtype_of_base" else name
        if name not in ("roae", "speed") and remembered in self.hparams:
            self.hparams[remembered] = whole_name(value) if name == "base" else value

    def _check_unbuilt(self, name: str, value: Any) -> None:
        if self._modules.get("model") is not None or vars(self).get("model") is not None:
            raise AttributeError(
                f"{name} cannot be changed to {value!r}: the model is built with {name}="
                f"{getattr(self, name)!r}. Make a new RoSAModule."
            )
        if name in ("base", "revision", "trust_remote_code"):
            self._tokenizer = self._num_embeddings = None

    # The model.

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.base, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        return self._tokenizer

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the base's embedding, all that a token id can name; None where not known."""
        if self.model is not None:
            return num_embeddings(self.model)
        if self._num_embeddings is None:
            self._num_embeddings = vocabulary_size(
                self.base, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        return self._num_embeddings

    @property
    def loading(self) -> dict[str, Any]:
        """How to load the base; the options that `load_base` and `load_skeleton` share."""
        return {
            "revision": self.revision,
            "dtype": self.dtype_of_base,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    def configure_model(self) -> None:
        """Load the base, freeze it and add RoAE; once."""
        if self.model is None:
            # Lightning calls this with the strategy's device as the default one, and moves the
            # module there afterwards.
            device = torch.get_default_device()
            with torch.device("cpu"):
                self._configure(device)

    def _configure(self, device: torch.device) -> None:
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                "RoSAModule does not run under DeepSpeedStrategy, which gathers weights for as "
                "many passes on every rank, where batches may take more or fewer. Set "
                "trainer.strategy to ddp, fsdp or ModelParallelStrategy."
            )
        model, self.identity, self.report = load_on_rank_zero(
            partial(self._adapted_base, device), strategy
        )
        self.roae = self.report.config  # an adapter brings its own
        if self.speed.compile:
            compile_layers(model, strategy)
        # Checkpointing and the base's dropout act in training mode only; Lightning keeps the mode.
        self.model = cast("PreTrainedModel", shard_and_broadcast(model.train(), strategy))
        self._forward = self._new_forward()
        leave_packed_out(self)
        rank_zero_info(str(self.report))

    def _new_forward(self) -> LossComputer:
        return LossComputer(cast("PreTrainedModel", self.model), self.speed)

    def _adapted_base(
        self, device: torch.device
    ) -> tuple[PreTrainedModel, BaseFingerprint, RoAEReport]:
        # Weights in few bits are packed by the device's own kernels.
        model = load_base(self.base, quantization=self.quantization, device=device, **self.loading)
        identity = fingerprint(model, self.base)
        report = self.adapt(model)
        if self.gradient_checkpointing:
            enable_checkpointing(model)
        return model, identity, report

    def adapt(self, model: PreTrainedModel) -> RoAEReport:
        """Add RoAE to a base as this module is told to: anew, or an adapter's."""
        if self.adapter is None:
            return inject_roae(model, self.roae)
        given = None if self.roae is _DEFAULT_ROAE else self.roae
        self.trained_under = read_metadata(Path(self.adapter)).conditions
        return load_adapter(model, self.adapter, given)

    def to(self, *args: Any, **kwargs: Any) -> RoSAModule:
        """Move to a device; a dtype is left out unless it is float64.

        Lightning's bf16-true and 16-true cast the whole module, adapters included. The base's
        dtype is ``dtype``'s to say, and adapters are trained in float32.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype == torch.float64:
            return self.double()
        if device is not None:
            super().to(device=device, non_blocking=non_blocking)
        return self

    def double(self) -> RoSAModule:
        """Cast base and adapters to float64, and say so once.

        Raises:
            ValueError: The base is quantised.
        """
        if any(is_packed(weight) for weight in self.parameters()):
            raise ValueError(
                "precision 64-true cannot be had on a quantised base, whose values have a few "
                "bits. Set trainer.precision to 32-true, or take model.quantization out."
            )
        if not self._said_float64:
            self._said_float64 = True
            rank_zero_info("64-true: base and adapters are cast to float64.")
        return super().double()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The adapted model's own forward."""
        return self._built()(input_ids=input_ids, **kwargs)

    def _built(self) -> PreTrainedModel:
        if self.model is None:
            self.configure_model()
        return cast("PreTrainedModel", self.model)

    # Training.

    def setup(self, stage: str) -> None:
        """See to how checkpoints are written, and refuse what cannot be before loading."""
        super().setup(stage)
        self._to_fit = None
        use_atomic_checkpoints(self.trainer.strategy)
        if stage == "fit":
            check_outputs(self.trainer)
            check_clipping(self.trainer.gradient_clip_val)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the response, averaged over the batch's response tokens, in nats.

        Args:
            batch: Of `ReasoningDataModule`, or with the fields of `transformers`: ``input_ids``,
                ``labels`` and ``attention_mask``, shape (B, T), padded on either side.
        """
        self._built()
        return cast(LossComputer, self._forward).loss(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss, logged as ``train/loss`` beside the step's learning rate."""
        loss = self.loss(batch)
        self._guard.add(loss, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=num_rows(batch))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_callbacks(self) -> list[Callback]:
        """What ends a run in order: by a signal, or where another rank has failed."""
        return [Stopping.for_run(self.trainer)]

    def agreed_settings(self) -> dict[str, Any]:
        """What all ranks must have in common, by configuration key; where the base lies is not."""
        settings = {key: value for key, value in self.hparams.items() if key != "base"}
        for group in ("roae", "speed"):
            settings |= {f"{group}.{key}": v for key, v in settings.pop(group).items()}
        settings["max_nonfinite_steps"] = self.max_nonfinite_steps
        settings |= {f"evaluation.{key}": v for key, v in asdict(self.evaluation).items()}
        return {f"model.{key}": value for key, value in settings.items()}

    def on_fit_start(self) -> None:
        """Look at the model anew: it may have been changed since it was last run."""
        cast(LossComputer, self._forward).reset()
        self._has_trained = False
        if self._to_fit is not None:
            checkpoint, self._to_fit = self._to_fit, None
            check_states_fit(checkpoint, self.trainer)

    def on_fit_end(self) -> None:
        """Refuse to pass for a training where a run that was to go on had come to its end.

        Raises:
            ValueError: Names the limit that stands in the way.
        """
        # Lightning calls no hook between restoring its counts and finding that they are reached.
        if self.trainer.global_step and not self._has_trained:
            raise ValueError(untrained_reason(self.trainer))

    def on_train_start(self) -> None:
        """Forget what was loaded for another purpose than going on."""
        self._guard.reset()
        if self.trainer.ckpt_path is None:
            self._to_restore = None
            self._guard.skipped = 0
        self.warn_of_other_conditions()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore generators and gradients late: starting up draws from them and clears these."""
        self._has_trained = True
        if self._to_restore is not None:
            if self._to_restore.gradients is not None:
                hold_gradients(self, self._to_restore.gradients)
            set_rng_state(self._to_restore.rng)
            self._to_restore = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop, or leave the step out, where loss or gradients are not finite."""
        self._guard.max_skipped = self.max_nonfinite_steps
        self._guard.check(self, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here where a signal asks for it, after all callbacks: checkpoints are saved."""
        # A search for a batch size runs its trials without callbacks.
        if (stopping := Stopping.of(self.trainer)) is not None:
            stopping.after_batch(self.trainer, batch_idx)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told to, under FSDP1 too."""
        done = gradient_clip_val is not None and self._guard.clip(
            self._built(), optimizer, gradient_clip_val, gradient_clip_algorithm
        )
        if not done:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all adapters, and the schedule, stepped once an optimizer step."""
        check_trainable(self._built())
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            optimizer = self.make_optimizer(parameters)
            scheduler = self.make_lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the optimizer or its schedule cannot be made: {error} Mend optimizer.init_args "
                "or lr_scheduler.init_args."
            ) from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": lightning_scheduler(scheduler, self.trainer),
        }

    # Evaluation.

    def on_validation_start(self) -> None:
        """Make the metrics for the tasks at hand."""
        self.warn_of_other_conditions()
        self._answer_tokens = MeanMetric().to(self.device)
        # Lightning's own mean rounds the ranks' mean number of tokens down to a whole one.
        self._val_loss = MeanMetric().to(self.device)
        self._written = None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, whether answers' tokens are the first choice, and answers as the model writes them.

        Answers are written to the prompts under ``to_answer``, if the batch has some.
        """
        self._built()
        batch = cast(LossComputer, self._forward).complete_batch(batch)
        scored = cast(LossComputer, self._forward).score(batch)
        self._val_loss.update(scored.loss, weight=scored.count)
        self._answer_tokens.update(scored.correct)
        if "to_answer" in batch:
            self._write_answers(batch["to_answer"])

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop here where a signal asks for it."""
        if (stopping := Stopping.of(self.trainer)) is not None:
            stopping.after_validation_batch(self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, ``val/accuracy`` and ``val/answer_tokens_given_rationale``."""
        values: dict[str, Any] = {
            "loss": self._val_loss.compute(),
            "answer_tokens_given_rationale": self._answer_tokens.compute(),
        }
        if self._written is not None:
            written = self._written.compute()
            values |= {name: v for name, v in written.items() if not name.startswith("macro")}
        for name, value in values.items():
            # Of all ranks already; said again, or Lightning warns.
            self.log(f"val/{name}", value, prog_bar=name in ("loss", "accuracy"), sync_dist=True)

    # Checkpoints.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters alone, whole or as this rank's shards."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(prefix) and not is_adapter_key(key)]:
            del state[key]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters, and remember the base and what every rank goes on with.

        Raises:
            ValueError: The adapters, or gradients that a step waits with, hold NaN or infinity.
                What is on disk stays.
        """
        with together("check of the weights"):  # ranks may hold other shards, or none
            try:
                check_weights(checkpoint["state_dict"])
            except ValueError as error:
                raise ValueError(f"the checkpoint is not saved: {error}") from error
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        waiting = training and self.trainer.fit_loop._should_accumulate()
        if waiting:
            self._guard.check_begun(self)
        gradients = held_gradients(self) if waiting else None
        pack(checkpoint, cast(BaseFingerprint, self.identity), self.hparams["roae"], gradients)
        checkpoint[CHECKPOINT_KEY]["nonfinite_steps"] = self._guard.skipped
        if self._trainer is not None:
            checkpoint[CHECKPOINT_KEY]["conditions"] = self.conditions().to_dict()
        if training:
            due = due_validation(self.trainer, checkpoint.get("loops", {}))
            checkpoint[CHECKPOINT_KEY]["validation_due"] = due

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is ours and fits; `unpack` says what it refuses."""
        self._built()
        path = None if self._trainer is None else self.trainer.ckpt_path
        if "state_dict" not in checkpoint and path is not None and Path(path).is_file():
            # FSDP2 has loaded it already, passing over keys that it does not know.
            file = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
            check_adapter_keys(self, file["state_dict"])
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if fits:
            check_entries(checkpoint, self.trainer, {name for name, _ in self.named_parameters()})
            if not self.trainer.strategy.restore_checkpoint_after_setup:
                self._to_fit = checkpoint
            check_states(checkpoint.get("optimizer_states", ()))
            due = checkpoint.get(CHECKPOINT_KEY, {}).get("validation_due")
            begin_due_validation(self.trainer, checkpoint["loops"], due)
            settle_epoch(checkpoint["loops"])
        self._to_restore = unpack(
            checkpoint,
            cast(BaseFingerprint, self.identity),
            self.hparams["roae"],
            rank=self.global_rank,
            world_size=self.trainer.world_size if fits else None,
        )
        self._guard.skipped = checkpoint[CHECKPOINT_KEY].get("nonfinite_steps", 0)
        known = checkpoint[CHECKPOINT_KEY].get("conditions")  # not in those of earlier versions
        self.trained_under = None if known is None else Conditions.from_dict(known)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load adapters: exactly the base's weights are missing, and nothing else.

        Raises:
            ValueError: Names what is missing, unknown, or of another shape.
        """
        check_adapter_keys(self, state_dict)
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[])
