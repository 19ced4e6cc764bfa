"""`RoSAModule`: training and evaluation of a frozen RoPE language model with RoAE."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from rosa_lightning.adapted import AdaptedModel
from rosa_lightning.adapters.checkpoint import CHECKPOINT_KEY, RankState, pack, unpack
from rosa_lightning.adapters.fingerprint import weights_digest
from rosa_lightning.adapters.metadata import Conditions, tokenizer_digest
from rosa_lightning.adapters.methods import method_to_dict
from rosa_lightning.adapters.resume_checks import check_entries, check_states_fit
from rosa_lightning.data.collators import num_rows
from rosa_lightning.data.text_info import TextInfo
from rosa_lightning.evaluation.checks import check_lengths, check_test_prompts
from rosa_lightning.evaluation.evaluator import Evaluation, EvaluationConfig, predictions
from rosa_lightning.evaluation.generation import Sampling, generate
from rosa_lightning.models.finite import check_states, check_weights
from rosa_lightning.models.loading import context_length
from rosa_lightning.models.location import whole_name
from rosa_lightning.models.quantization import check_trainable
from rosa_lightning.roae.inject import check_adapter_keys
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.training.checkpoint_io import check_outputs, use_atomic_checkpoints
from rosa_lightning.training.guard import StepGuard, check_clipping, check_max_nonfinite_steps
from rosa_lightning.training.resume import (
    accumulates,
    begin_due_validation,
    due_validation,
    settle_epoch,
    untrained_reason,
)
from rosa_lightning.training.schedule import WarmupCosine, lightning_scheduler
from rosa_lightning.training.sharding import is_sharded
from rosa_lightning.training.speed import check_batching
from rosa_lightning.utils.agreement import together
from rosa_lightning.utils.modules import held_gradients, hold_gradients
from rosa_lightning.utils.rng import set_rng_state
from rosa_lightning.utils.stopping import Stopping


class RoSAModule(AdaptedModel):
    """Fine-tunes a frozen RoPE language model through RoAE alone.

    Only the RoAE weights are trained, in float32 under every precision but 64-true. Checkpoints
    hold them and not the base. The arguments are those of `AdaptedModel`.

    Attributes:
        make_optimizer: Makes the optimizer from the trainable parameters; AdamW at 1e-3 by default.
        make_lr_scheduler: Makes the learning rate schedule, stepped once an optimizer step;
            `WarmupCosine` by default.
        max_nonfinite_steps: Optimizer steps of a run that are left out, with a warning, where loss
            or gradients are not finite; the next one stops the run. 0 by default.
    """

    evaluated: Evaluation
    """The last test, with its scores."""

    def _prepare(self) -> None:
        self.make_optimizer: OptimizerCallable = partial(AdamW, lr=1e-3, weight_decay=0.0)
        self.make_lr_scheduler: LRSchedulerCallable = WarmupCosine
        self.max_nonfinite_steps = 0
        self._val_answers: Evaluation | None = None
        """Answers written in the validation at hand."""
        self._guard = StepGuard(0)
        self._to_restore: RankState | None = None
        self._checkpoint_to_check: Mapping[str, Any] | None = None
        """A checkpoint to compare with the optimizers, once there are some."""
        self._has_trained = False
        self._loaded: str | None = None
        """Digest of the weights of the checkpoint that is tested."""

    # Training.

    def setup(self, stage: str) -> None:
        """Check settings before the model is loaded, and let checkpoints be written whole."""
        if stage == "fit":
            check_max_nonfinite_steps(self.max_nonfinite_steps)
            check_outputs(self.trainer)
            check_clipping(self.trainer.gradient_clip_val)
        if stage in ("test", "predict") and is_sharded(self.trainer.strategy):
            # Ranks finish at different lengths, and would wait for each other's shards forever.
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} cannot write answers, whose lengths "
                "differ from rank to rank. Set trainer.strategy to auto or ddp, and --ckpt_path to "
                "a full checkpoint."
            )
        text = self.text_info()
        location = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        context = context_length(self.base, **location)
        if stage == "test":
            check_test_prompts(text.test_examples, self.evaluation, context)
        elif stage in ("fit", "validate"):  # which may go before, and needs the base
            check_lengths(text.max_length, context)
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            check_batching(self.speed, getattr(datamodule, "batching", ""))
        self._checkpoint_to_check = None
        use_atomic_checkpoints(self.trainer.strategy)

    def text_info(self) -> TextInfo:
        """What the data module says of its texts; a user's own may say nothing."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if "text_info" not in dir(datamodule):  # an error within it is not the lack of it
            return TextInfo()
        found: TextInfo = datamodule.text_info
        return found

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the response, averaged over the batch's response tokens, in nats.

        Args:
            batch: Of `ReasoningDataModule`, or with the fields of `transformers`: ``input_ids``,
                ``labels`` and ``attention_mask``, shape (B, T), padded on either side.
        """
        self.ensure_model()
        return self.loss_computer.loss(batch)

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
        self.loss_computer.reset()
        self._has_trained = False
        if self._checkpoint_to_check is not None:
            checkpoint, self._checkpoint_to_check = self._checkpoint_to_check, None
            check_states_fit(checkpoint, self.trainer)

    def on_fit_end(self) -> None:
        """Free what only training needs.

        Refuse a resumed run that had reached its limit already, so that nothing was trained.

        Raises:
            ValueError: Names the limit that stands in the way.
        """
        self.loss_computer.let_go()
        # Lightning calls no hook between restoring its counts and finding that they are reached.
        if self.trainer.global_step and not self._has_trained:
            raise ValueError(untrained_reason(self.trainer))

    def on_train_start(self) -> None:
        """Discard restored state unless this fit resumes from `ckpt_path`."""
        self._guard.reset()
        if self.trainer.ckpt_path is None:
            self._to_restore = None
            self._guard.skipped = 0
        self._warn_of_conditions()

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
            self.ensure_model(), optimizer, gradient_clip_val, gradient_clip_algorithm
        )
        if not done:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all adapters, and the schedule, stepped once an optimizer step."""
        check_trainable(self.ensure_model())
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            optimizer = self.make_optimizer(parameters)
            scheduler = self.make_lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the optimizer or its schedule cannot be made: {error} Correct "
                "optimizer.init_args or lr_scheduler.init_args."
            ) from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": lightning_scheduler(scheduler, self.trainer),
        }

    # Evaluation.

    def on_validation_start(self) -> None:
        """Make the metrics for the tasks at hand."""
        self._warn_of_conditions()
        self._answer_tokens = MeanMetric().to(self.device)
        # Lightning's own mean rounds the ranks' mean number of tokens down to a whole one.
        self._val_loss = MeanMetric().to(self.device)
        self._val_answers = None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, whether answers' tokens are the first choice, and answers as the model writes them.

        Answers are written to the prompts under ``to_answer``, if the batch has some.
        """
        self.ensure_model()
        scored = self.loss_computer.score(batch)
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
        if self._val_answers is not None:
            written = self._val_answers.compute()
            values |= {name: v for name, v in written.items() if not name.startswith("macro")}
        for name, value in values.items():
            # Reduced over the ranks already; without sync_dist Lightning warns.
            self.log(f"val/{name}", value, prog_bar=name in ("loss", "accuracy"), sync_dist=True)

    def _write_answers(self, prompts: dict[str, Any] | None) -> None:
        """Write and score the answers to some validation prompts; a model in shards cannot."""
        if is_sharded(self.trainer.strategy):
            return
        if self._val_answers is None:  # on every rank at its first batch, with prompts or without
            self._val_answers = self._new_evaluation(
                replace(self.evaluation, protocols=("generate",))
            )
        self._val_answers.step({"task": []} if prompts is None else prompts)

    def _new_evaluation(self, config: EvaluationConfig) -> Evaluation:
        text = self.text_info()
        tokenizer = text.tokenizer or self.tokenizer
        return Evaluation(self.ensure_model(), tokenizer, config, text)

    def on_test_start(self) -> None:
        """Get ready to answer and to score, under each protocol."""
        self._warn_of_conditions()
        self.evaluated = self._new_evaluation(self.evaluation)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Answer each prompt under each protocol: ``items`` is what `Evaluation.step` gives."""
        return {"items": self.evaluated.step(batch)}

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, ``test/accuracy/<task>`` and what else `Evaluation` counts."""
        for name, value in self.evaluated.compute().items():
            # Reduced over the ranks already; without sync_dist Lightning warns.
            self.log(f"test/{name}", value, prog_bar=name == "accuracy", sync_dist=True)

    def on_predict_start(self) -> None:
        """Say what differs from the training."""
        self._warn_of_conditions()
        self._text = self.text_info()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Write an answer to each prompt; records as `predictions` gives them."""
        config = self.evaluation
        texts = generate(
            self.ensure_model(),
            self._text.tokenizer or self.tokenizer,
            batch,
            config.max_new_tokens,
            sampling=Sampling(config.temperature, config.top_p),
            stop_ids=self._text.stop_ids,
        )
        return predictions(batch, texts, self._text.tasks)

    def about_evaluation(self) -> dict[str, Any]:
        """What was evaluated and how, as plain values, for ``results.json``."""
        here, added = self.conditions(), self._differs_from_base()
        path = self.trainer.ckpt_path
        origin = path or self.adapter or "an adapter trained in this process"
        return {
            "model": f"{self.base} + {origin}" if added else self.base,
            "base": self.base,
            "revision": self.base_fingerprint.revision,
            # To be found from any working folder; a path may hold other weights by then.
            "checkpoint": str(Path(path).absolute()) if path and Path(path).exists() else path,
            "weights_digest": self._loaded if path else weights_digest(self.state_dict()),
            **(method_to_dict(self.method) if added else {"roae": None}),
            **asdict(self.evaluation),
            "cut_prompts": self.text_info().cut_prompts,
            **here.to_dict(),
        }

    def _differs_from_base(self) -> bool:
        if not isinstance(self.method, RoAEConfig):  # they begin at the base's outputs
            loaded = self.trainer.ckpt_path or self.adapter
            return self._has_trained or loaded is not None
        # Where every B is zero, the outputs are the base's own.
        state = self.state_dict()
        return any(bool(state[name].any()) for name in state if name.endswith("roae_B"))

    # What an adapter was trained with, beside weights and RoAE.

    def conditions(self) -> Conditions:
        """What this run reads and writes with."""
        text = self.text_info()
        name, tokenizer = text.tokenizer_name, text.tokenizer
        return Conditions(
            prompt_style=text.prompt_style,
            max_length=text.max_length,
            tokenizer=None if name is None else whole_name(name),
            tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
            precision=str(self.trainer.precision),
            dtype=self.base_dtype,
            quantization=self.quantization,
        )

    def _warn_of_conditions(self) -> None:
        """Say, once, what this run does otherwise than the training of what was loaded."""
        trained, self.training_conditions = self.training_conditions, None
        for line in [] if trained is None else trained.conflicts(self.conditions()):
            rank_zero_warn(line)

    # Checkpoints.

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
        trainer = self.attached_trainer()
        training = trainer is not None and trainer.state.fn == "fit"
        waiting = training and accumulates(self.trainer)
        if waiting:
            self._guard.check_begun(self)
        gradients = held_gradients(self) if waiting else None
        pack(checkpoint, self.base_fingerprint, self.method, gradients)
        about = checkpoint[CHECKPOINT_KEY]
        about["nonfinite_steps"] = self._guard.skipped
        if trainer is not None:
            about["conditions"] = self.conditions().to_dict()
        if training:
            about["validation_due"] = due_validation(self.trainer, checkpoint.get("loops", {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is ours and fits; `unpack` says what it refuses."""
        self.ensure_model()
        trainer = self.attached_trainer()
        path = None if trainer is None else trainer.ckpt_path
        if "state_dict" not in checkpoint and path is not None and Path(path).is_file():
            # FSDP2 has loaded it already, passing over keys that it does not know.
            file = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
            check_adapter_keys(self, file["state_dict"], everything=self.finetune == "full")
        if trainer is not None and trainer.state.fn == "test":
            self._loaded = weights_digest(checkpoint["state_dict"])  # before any conversion
        fits = trainer is not None and trainer.state.fn == "fit"
        if fits:
            check_entries(checkpoint, self.trainer, {name for name, _ in self.named_parameters()})
            if not self.trainer.strategy.restore_checkpoint_after_setup:
                self._checkpoint_to_check = checkpoint
            check_states(checkpoint.get("optimizer_states", ()))
            due = checkpoint.get(CHECKPOINT_KEY, {}).get("validation_due")
            begin_due_validation(self.trainer, checkpoint["loops"], due)
            settle_epoch(checkpoint["loops"])
        self._to_restore = unpack(
            checkpoint,
            self.base_fingerprint,
            self.method,
            rank=self.global_rank,
            world_size=self.trainer.world_size if fits else None,
        )
        self._guard.skipped = checkpoint[CHECKPOINT_KEY].get("nonfinite_steps", 0)
        known = checkpoint[CHECKPOINT_KEY].get("conditions")  # not in those of earlier versions
        self.training_conditions = None if known is None else Conditions.from_dict(known)
