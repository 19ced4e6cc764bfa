"""The command line: LightningCLI for the trainer's commands, and beside them our own.

Private members used, as of Lightning 2.6 and jsonargparse 4.53: `LightningCLI._add_subcommands`,
`_add_arguments`, `_prepare_subcommand_parser`, `_set_seed`, `_run_subcommand`, `_parse_ckpt_path`,
`_get`, `_subcommand_parsers`, `_subcommand_method_arguments`; the parser's `_actions`,
`_action_groups`, `_subcommands_action` and `_choices_actions`; `DDPStrategy._ddp_kwargs`;
`ModelParallelStrategy._data_parallel_size` and `_tensor_parallel_size`; `_parse_ckpt_path` and
`_hpc_resume_path` of `Trainer._checkpoint_connector`.
"""

import io
import os
import signal
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader, set_parsing_settings
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rosa_lightning.adapters.checkpoint import checkpoint_defaults
from rosa_lightning.adapters.metadata import contradictions
from rosa_lightning.cli.audit import audit
from rosa_lightning.cli.chat import chat
from rosa_lightning.cli.commands import NO_BASE, CommandContext, export, report
from rosa_lightning.cli.compare import add_bare_arguments, compare
from rosa_lightning.cli.configuration import (
    ONE_SELECTION,
    VISIBLE_KEYS,
    check_accelerator,
    check_classes,
    check_optimizer,
    check_trainer_settings,
)
from rosa_lightning.cli.inspect import inspect
from rosa_lightning.cli.messages import messages
from rosa_lightning.cli.names import COMMANDS, DESCRIPTION, usage
from rosa_lightning.cli.parser import TRACEBACK_VARIABLE, RoSAParser, begin_anew
from rosa_lightning.cli.process import (
    SaveRunConfig,
    configuration_errors,
    listed,
    no_empty_run,
    quiet_log_writers,
    read_pipes,
    run_defaults,
)
from rosa_lightning.cli.strict_yaml import load_yaml
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.evaluation.writers import PredictionWriter, ResultWriter
from rosa_lightning.inspection.progress import SHOWN
from rosa_lightning.inspection.run_summary import RunSummary
from rosa_lightning.module import RoSAModule
from rosa_lightning.training.checkpoint_io import check_outputs
from rosa_lightning.utils.errors import ConfigurationError, explain, is_configuration
from rosa_lightning.utils.stopping import unwinding
from rosa_lightning.utils.trainer import callbacks_of

_TOOLS: tuple[Callable[..., None], ...] = (chat, export, inspect, audit, compare, report)
TOOL_COMMANDS = {tool.__name__: tool for tool in _TOOLS}


class RoSACLI(LightningCLI):
    """LightningCLI over `RoSAModule` and `ReasoningDataModule`.

    Args:
        given: The command line, without the program's name.
    """

    def __init__(self, *args: Any, given: Sequence[str], **kwargs: Any):
        self.given = given
        self.wanted = wanted_commands(given)
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Optimizer and schedule at the top level, given to the model."""
        # Not required: a checkpoint or an adapter may name it. `parse_arguments` asks for it.
        parser.set_defaults({"model.base": ""})
        actions = {action.dest: action for action in parser._actions}
        actions["model.base"].required = False
        begin_anew(actions["model.peft"])
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=False,
            help="Validate before a training starts, so that its curves begin with the base.",
        )
        parser.add_argument(
            "--optimizer",
            type=OptimizerCallable,
            default={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1e-3, "weight_decay": 0.0},
            },
            help="Any torch optimizer, over the adapters.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=LRSchedulerCallable,
            default={"class_path": "rosa_lightning.WarmupCosine"},
            help="Any torch learning rate schedule, stepped once an optimizer step.",
        )
        parser.add_argument(
            "--max_nonfinite_steps",
            type=NonNegativeInt,
            default=0,
            help="Optimizer steps of a run that are left out, with a warning, where loss or "
            "gradients are not finite; the next one stops the run.",
        )
        parser.add_lightning_class_args(DynamicLayerSelection, "dls")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with what a checkpoint or an adapter knows of its model as defaults.

        Where ckpt_path and adapter are set is known only after a first parse.
        """
        with configuration_errors("the configuration cannot be read"):
            self.given = read_pipes(self.given)  # which can be read once
            quiet = [arg for arg in self.given if not arg.startswith("--print_config")]
            config = parser.parse_args(quiet)
        command = config.subcommand
        ckpt_path = config[command].get("ckpt_path")
        if command not in TOOL_COMMANDS and ckpt_path is not None and is_checkpoint_word(ckpt_path):
            ckpt_path = None
        known: dict[str, Any] = {}
        if VISIBLE_KEYS.get(command) != ():
            known = checkpoint_defaults(ckpt_path, config[command].model)
            self._subcommand_parsers[command].set_defaults(known)
        learnt = bool(known) or quiet != self.given
        self.config = parser.parse_args(self.given) if learnt else config
        if ckpt_path is not None and self.config[command].model.adapter is not None:
            self.config[command].model.adapter = None
            rank_zero_info("model.adapter is left out, as ckpt_path holds an adapter.")
        if command in TOOL_COMMANDS:
            shown = {
                k: self.config[command].get(k) for k in known if k.startswith(VISIBLE_KEYS[command])
            }
            for line in contradictions(known, shown, "the adapter"):
                rank_zero_warn(line)
        if command not in TOOL_COMMANDS and not self.config[command].model.base:
            parser.error(NO_BASE)

    def before_fit(self) -> None:
        """Validate the base, if that was asked for and this run is not the rest of another."""
        check_outputs(self.trainer)  # before anything is logged
        config = self.config_init["fit"]
        nothing = not (self.trainer.limit_val_batches and self.datamodule.val_fraction)
        trainer: Any = self.trainer  # `callbacks` is there, but not declared
        requeued = trainer._checkpoint_connector._hpc_resume_path  # written where SLURM stopped it
        resumes = bool(config["ckpt_path"] or (SLURMEnvironment.detect() and requeued))
        for callback in callbacks_of(trainer, SaveRunConfig):
            callback.resumes = resumes
        if nothing or not config["validate_first"] or resumes:
            return
        # Logged here, and without callbacks: a validation ends by closing the event file, and
        # callbacks would take it for the run.
        loggers, callbacks = trainer.loggers, trainer.callbacks
        trainer.loggers = []
        trainer.callbacks = [c for c in callbacks if isinstance(c, ProgressBar | RunSummary)]
        (metrics,) = trainer.validate(self.model, self.datamodule, verbose=False)
        trainer.loggers, trainer.callbacks = loggers, callbacks
        found = ", ".join(f"{SHOWN[k]} {v:.4g}" for k, v in metrics.items() if k in SHOWN)
        rank_zero_info(f"before training: {found}")
        for logger in loggers:
            logger.log_metrics(dict(metrics), step=0)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Describe the commands in this package's words; Lightning's are cut after two lines."""
        own = {
            name: {**kwargs.get(name, {}), "description": about, "usage": usage(name)[7:]}
            for name, about in COMMANDS.items()
        }
        super()._add_subcommands(parser, **own)
        listed: Any = parser._subcommands_action
        for name in TOOL_COMMANDS:
            self._subcommand_parsers[name] = self._prepare_tool_parser(name, **own[name])
            listed.add_subcommand(name, self._subcommand_parsers[name], help=COMMANDS[name])
        for action in listed._choices_actions:
            action.help = COMMANDS[action.dest]

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Build the parser of a command that is asked for; the others need only their names.

        Each full parser reads the docstrings of the whole trainer, which takes 0.4 s.
        """
        if subcommand in self.wanted:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            if subcommand == "test":
                parser.set_defaults({"verbose": False})  # our own table is shown
            return parser
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def _prepare_tool_parser(self, name: str, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser of a command that is not the trainer's.

        It takes any configuration of a training, and shows what means something to the command.
        """
        parser = self.init_parser(**kwargs)
        if name not in self.wanted:
            return parser
        self._add_arguments(parser)
        parser.add_argument("--weights_only", type=bool | None, default=None)
        for group in parser._action_groups[1:]:
            about_model = group.title and "RoSAModule" in group.title and VISIBLE_KEYS[name]
            group.title, group.description = "model" if about_model else None, None
        for action in parser._actions:
            if not action.dest.startswith(("help", "config", *VISIBLE_KEYS[name])):
                action.help = SUPPRESS
        bare = add_bare_arguments(parser) if name == "compare" else []
        own = parser.add_function_arguments(
            TOOL_COMMANDS[name], skip={"context", *bare}, as_positional=name == "report"
        )
        parser._action_groups[-1].title = name
        self._subcommand_method_arguments[name] = [*own, *bare]
        return parser

    def _set_seed(self) -> None:
        """Seed, in silence."""
        with configuration_errors("seed_everything cannot be used", "Set another number."):
            seed_everything(self._get(self.config, "seed_everything"), verbose=False)

    def instantiate_classes(self) -> None:
        """Make what the command needs; the commands of this package get no Trainer."""
        config = self.config[self.subcommand]
        with configuration_errors("the configuration cannot be used"):
            check_classes(config)
            if "trainer" in config:  # not for a command that takes no configuration
                check_trainer_settings(config.trainer)
            if self.subcommand in TOOL_COMMANDS:
                self.config_init = self.parser.instantiate_classes(self.config)
            else:
                super().instantiate_classes()
        given = self.config_init[self.subcommand]
        if "model" in given:
            module = given["model"]
            module.make_optimizer, module.make_lr_scheduler = given.optimizer, given.lr_scheduler
            module.max_nonfinite_steps = given.max_nonfinite_steps
        if self.subcommand == "fit":
            check_optimizer(given.optimizer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command of the trainer, or another."""
        config = self.config_init[subcommand]
        if subcommand not in TOOL_COMMANDS:
            with unwinding(signal.SIGTERM), no_empty_run(self.trainer):
                check_checkpoint_found(self.trainer, subcommand, config.get("ckpt_path"))
                super()._run_subcommand(subcommand)
            return
        options = {name: config[name] for name in self._subcommand_method_arguments[subcommand]}
        trainer = dict(config["trainer"])
        trainer["callbacks"] = [config["dls"], *listed(trainer.get("callbacks"))]
        context = CommandContext(
            config["model"],
            config["data"],
            trainer,
            partial(self._shared, subcommand),
            partial(self._built, subcommand),
        )
        with unwinding(signal.SIGTERM):
            TOOL_COMMANDS[subcommand](context, **options)

    def _shared(self, subcommand: str, files: Sequence[Path | str] = ()) -> str:
        """The configuration of a training that a command was given, as YAML for ``fit``.

        In its place that of some configuration files, or of their texts.
        """
        config = self.config[subcommand].clone()
        if files:
            parser = self._subcommand_parsers[subcommand]
            config = parser.parse_args([f"--config={file}" for file in files])
        for name in (*self._subcommand_method_arguments[subcommand], "config", "weights_only"):
            config.pop(name, None)
        return str(self._subcommand_parsers[subcommand].dump(config, skip_none=False))

    def _built(self, subcommand: str, files: Sequence[Path]) -> RoSAModule:
        """The module that some configuration files describe."""
        parser = self._subcommand_parsers[subcommand]
        config = parser.parse_args([f"--config={file}" for file in files])
        module: RoSAModule = parser.instantiate_classes(config).model
        return module

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as given; Lightning would overwrite it with the checkpoint's."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; what Lightning refuses is the user's to mend."""
        if self._get(self.config_init, "trainer.strategy") == ModelParallelStrategy.__name__:
            # Lightning knows the other strategies by short names, and this one by its class alone.
            kwargs["strategy"] = ModelParallelStrategy()
        for callback in listed(self._get(self.config_init, "trainer.callbacks")):
            if isinstance(callback, DynamicLayerSelection) and callback.layers is None:
                raise ConfigurationError(ONE_SELECTION)
        given = self.config_init[self.subcommand]
        check_accelerator(given.trainer.accelerator)
        kwargs |= run_defaults(given.trainer, given.dls if self.subcommand == "fit" else None)
        with configuration_errors("the trainer cannot be made", "Correct the settings of trainer."):
            trainer = super().instantiate_trainer(**kwargs)
        # Layers are frozen before other callbacks look at them.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda item: not isinstance(item, DynamicLayerSelection))
        complete_strategy(trainer, trains=self.subcommand == "fit")
        return trainer


def complete_strategy(trainer: Trainer, *, trains: bool) -> None:
    """Set what a strategy needs here and the user has left open, and say so."""
    strategy: Any = trainer.strategy
    selects = any(one.selects for one in callbacks_of(trainer, DynamicLayerSelection))
    if isinstance(strategy, DDPStrategy) and selects and trains:
        if "find_unused_parameters" not in strategy._ddp_kwargs:
            strategy._ddp_kwargs["find_unused_parameters"] = True
            rank_zero_info("DDP with find_unused_parameters=True, since layers are frozen.")
    elif isinstance(strategy, ModelParallelStrategy):
        sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)
        if sizes == ("auto", "auto"):
            strategy._data_parallel_size, strategy._tensor_parallel_size = trainer.world_size, 1
            rank_zero_info(f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1.")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0; 1 for a failure, 2 for a wrong command line, 130 for Ctrl-C; SIGTERM exits with 143.
    """
    # Nothing is called but what a type of ours or of Lightning asks for, and nothing is imported
    # that jsonargparse counts as dangerous, such as os and subprocess.
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=[],
    )
    set_loader("yaml", load_yaml, (yaml.YAMLError,))
    # Names of files may hold bytes that are not UTF-8; they are shown as the error stream does.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with messages(), quiet_log_writers():
        return _run(args)


def _run(args: Sequence[str] | None) -> int:
    try:
        RoSACLI(
            RoSAModule,
            ReasoningDataModule,
            save_config_callback=SaveRunConfig,
            parser_class=RoSAParser,
            parser_kwargs={"prog": "python -m rosa_lightning", "description": DESCRIPTION},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [PredictionWriter(), ResultWriter()],
                # The module's validation needs no rehearsal before every training.
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,  # `RunSummary` tells more
            },
            given=sys.argv[1:] if args is None else args,
            args=None if args is None else list(args),
        )
    except (KeyboardInterrupt, SystemExit) as ending:
        # Lightning hands a Ctrl-C on as the other.
        if KeyboardInterrupt not in (type(ending), type(ending.__context__)):
            raise
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT
    except Exception as error:
        told = explain(error)
        if told is None or os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        sys.stderr.write(f"error: {told}\n")
        return 2 if is_configuration(error) else 1
    return 0


def wanted_commands(args: Sequence[str]) -> Collection[str]:
    """The commands that stand on a command line; all, if it may leave them to a file."""
    named = [command for command in COMMANDS if command in args]
    return named if named or {"-h", "--help"} & set(args) else tuple(COMMANDS)


def is_checkpoint_word(ckpt_path: str) -> bool:
    """Whether a checkpoint is one that the trainer finds: "last", or a file elsewhere, say."""
    is_word = ckpt_path.partition(":")[0] in ("best", "last", "hpc", "registry")
    return (is_word and not Path(ckpt_path).exists()) or "://" in ckpt_path


def check_checkpoint_found(trainer: Trainer, command: str, ckpt_path: str | None) -> None:
    """Raise ValueError where a word asks the trainer for a checkpoint and there is none.

    Lightning would evaluate the base if there is no last one. A training begins anew then, so that
    the command of the first run is that of the next.
    """
    if ckpt_path not in ("best", "last", "hpc") or Path(ckpt_path).exists():
        return
    found = None
    with suppress(ValueError, MisconfigurationException), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in other words
        found = trainer._checkpoint_connector._parse_ckpt_path(
            TrainerFn(command), ckpt_path, model_provided=True, model_connected=False
        )
    if found is None and not (command == "fit" and ckpt_path == "last"):
        callbacks: list[Any] = trainer.checkpoint_callbacks
        folders = [str(item.dirpath) for item in callbacks if getattr(item, "dirpath", None)]
        looked = f" in {', '.join(folders)}" if folders and ckpt_path == "last" else ""
        raise ValueError(
            f"ckpt_path={ckpt_path}: there is no such checkpoint{looked}, since this "
            "command runs in a new log folder. Give its path, such as "
            "lightning_logs/version_0/checkpoints/last.ckpt."
        )
