"""Names of commands and settings, known without torch and Lightning: `--help` and typos are quick.

Importing Lightning takes several times as long as importing torch. So the names on a command line
and in its configuration files are checked against the signatures in the source files; what is not
plainly wrong is left to the parser.
"""

import ast
import difflib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DESCRIPTION = (
    "RoSA fine-tuning: RoAE adapters on the low-frequency RoPE dimensions of Q and K, trained in "
    "the layers that Dynamic Layer Selection picks."
)
COMMANDS = {
    "fit": "Train adapters.",
    "validate": "Loss and accuracy on the validation split.",
    "test": "Write answers to the test sources and score them.",
    "predict": "Write answers to the predict sources into predictions.jsonl.",
    "chat": "Talk to a base or a trained adapter.",
    "export": "Write a trained adapter for PEFT and servers, or merged into its base.",
    "inspect": "Show what RoAE adapts and the memory it takes, without loading weights.",
    "audit": "Look at the training data: lengths, duplicates, contamination.",
    "compare": "Compare methods at equal budgets, or their speed alone, or two finished tests.",
    "report": "Write what a run has logged as one HTML page.",
}
"""What each command does, for ``--help``."""
RENAMED_COMMANDS = {"bench": "compare --speed_only"}
"""Commands of earlier versions, and what they are called now."""
SUGGESTION = " Did you mean"
_LOADING = (
    *("cache_dir", "decontaminate", "num_workers", "overlong", "stop", "temperature"),
    *("tokens_per_batch", "val_generate"),
)
_POLICY = (
    *("always_active", "fixed_layers", "score_normalization", "score_share"),
    *("score_smoothing", "temperature"),
)
_SPEED = ("share_prefix", "loss_chunk", "microbatch_tokens", "recompute_activations", "compile")
RENAMED = {
    **{f"model.{name}": f"model.speed.{name}" for name in _SPEED},
    **{f"data.{name}": f"data.loading.{name}" for name in _LOADING},
    **{f"dls.{name}": f"dls.policy_options.{name}" for name in _POLICY},
    "data.template": "data.prompt_style",
    "model.gradient_checkpointing": "model.speed.gradient_checkpointing",
    "model.max_new_tokens": "model.evaluation.max_new_tokens",
    "dls.moments": "dls.optimizer_state",
    "comparison.split_seed": "data.loading.split_seed",
    "model.max_nonfinite_steps": "max_nonfinite_steps",
}
"""Keys of earlier versions, and what they are called now."""
_PACKAGE = Path(__file__).parents[1]
GROUPS = {
    "model": ("adapted.py", "AdaptedModel"),
    "model.roae": ("roae/layer.py", "RoAEConfig"),
    "model.speed": ("training/speed.py", "SpeedConfig"),
    "model.evaluation": ("evaluation/evaluator.py", "EvaluationConfig"),
    "data": ("data/datamodule.py", "ReasoningDataModule"),
    "data.loading": ("data/settings.py", "LoadingConfig"),
    "dls": ("dls/callback.py", "DynamicLayerSelection"),
    "dls.policy_options": ("dls/selector.py", "PolicyOptions"),
    "comparison": ("comparison/plan.py", "ComparisonConfig"),
    "trainer": ("", "Trainer"),
}
"""Groups of settings, and the classes whose arguments they are."""


def usage(command: str) -> str:
    """How a command is called, without the hundreds of its settings."""
    folder = " RUN" if command == "report" else ""
    return f"usage: python -m rosa_lightning {command}{folder} [--config FILE] [--KEY VALUE ...]"


def general_help() -> str:
    """What the command line offers."""
    lines = [f"  {name:<12}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        (
            f"{usage('COMMAND')}\n",
            f"{textwrap.fill(DESCRIPTION, 79)}\n",
            "commands:",
            *lines,
            "",
            "python -m rosa_lightning COMMAND --help shows the settings of a command,",
            "and COMMAND --config FILE --print_config those of a configuration with all defaults.",
        )
    )


def first_look(args: Sequence[str]) -> str | None:
    """What is plainly wrong with a command line, in one line; None if the parser is to see it."""
    command = args[0]
    if command in RENAMED_COMMANDS:
        return f"the command {command} is {RENAMED_COMMANDS[command]} now."
    if not command.startswith("-") and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"{SUGGESTION} {near[0]}?" if near else f" Choose from {', '.join(COMMANDS)}."
        return f"{command} is no command.{advice}"
    groups = known_settings()
    for name in _given(args):
        if (near_by := unknown(name, groups)) is not None:
            return f"the setting {name} is unknown.{near_by}"
    return None


def unknown(name: str, groups: dict[str, frozenset[str]]) -> str | None:
    """What to look at in place of a setting that is none; None of one that may be known."""
    group, _, rest = name.partition(".")
    if group not in groups[""]:
        wanted, prefix = groups[""], ""
    else:
        inner, _, last = rest.partition(".")
        prefix = f"{group}.{inner}." if f"{group}.{inner}" in groups and last else f"{group}."
        wanted = groups.get(prefix[:-1], frozenset())
        own = last.partition(".")[0] if prefix.count(".") > 1 else inner
        if own in ("", "help") or not wanted or own in wanted:
            return None
    others = ((key, names) for key, names in groups.items() if key not in ("", "comparison"))
    known = {one: f"{key}.{one}" for key, names in others for one in names}
    known |= {one: f"{prefix}{one}" for one in wanted}
    last = name.rpartition(".")[2]
    near = [known[one] for one in difflib.get_close_matches(last, known, n=1, cutoff=0.65)]
    near = [RENAMED[name]] if name in RENAMED else near
    listed = " python -m rosa_lightning COMMAND --help lists those of a command."
    return f"{SUGGESTION} {near[0]}?" if near else listed


@cache
def known_settings() -> dict[str, frozenset[str]]:
    """The settings of each group by its name, and under "" those of any command."""
    found = {name: _arguments(path, kind) for name, (path, kind) in GROUPS.items()}
    top = {"config", "print_config", "help", "h", "ckpt_path", "weights_only", "verbose"}
    top |= {"model", "data", "dls", "trainer", "seed_everything", "return_predictions"}
    for file in (_PACKAGE / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef) and node.name in COMMANDS:
                top |= set(_names(node))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    top.add(first.value.lstrip("-"))
    return {"": frozenset(top), **found}


def _arguments(path: str, kind: str) -> frozenset[str]:
    """The arguments of a class's constructor, or the fields of a dataclass, from its source."""
    spec = None if path else find_spec("lightning")
    places = spec.submodule_search_locations or [""] if spec else []
    file = Path(places[0], "pytorch", "trainer", "trainer.py") if places else _PACKAGE / path
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ClassDef) and node.name == kind:
            made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            if made:
                return frozenset(_names(made[0]))
            fields = (n.target for n in node.body if isinstance(n, ast.AnnAssign))
            return frozenset(field.id for field in fields if isinstance(field, ast.Name))
    return frozenset()


def _names(function: ast.FunctionDef) -> Iterator[str]:
    for argument in (*function.args.args, *function.args.kwonlyargs):
        if argument.arg not in ("self", "context"):
            yield argument.arg


def _given(args: Sequence[str]) -> Iterator[str]:
    """The settings that a command line names, and those in its configuration files."""
    for index, arg in enumerate(args):
        if not arg.startswith("--") or arg == "--":
            continue
        name, equals, value = arg[2:].partition("=")
        yield name.rstrip("+")
        if name == "config":
            value = value if equals else next(iter(args[index + 1 : index + 2]), "")
            yield from _keys_of(value)


def _keys_of(path: str) -> Iterator[str]:
    """The settings that a configuration file names; none of what is no plain file of them."""
    import yaml

    try:
        if not Path(path).is_file() or Path(path).stat().st_size > 2**20:
            return
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # said by the parser
    if root is not None and not {key for key, _ in _pairs(root)} & COMMANDS.keys():
        yield from _keys(root, "", 3)


def _pairs(node: Any) -> list[tuple[str, Any]]:
    """The keys and values of a mapping; none if it has keys of another kind, or is none."""
    pairs = node.value if type(node).__name__ == "MappingNode" else []
    plain = all(isinstance(key.value, str) and key.value != "<<" for key, _ in pairs)
    return [(key.value, value) for key, value in pairs] if plain else []


def _keys(node: Any, prefix: str, depth: int) -> Iterator[str]:
    for name, value in _pairs(node) if depth else []:
        yield f"{prefix}{name}"
        yield from _keys(value, f"{prefix}{name}.", depth - 1)


def answer_early(args: Sequence[str]) -> int | None:
    """Answer what needs no parser, and return the exit status; None for all else."""
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(f"{general_help()}\n")
        return 0
    wrong = first_look(args)
    if wrong is not None:
        sys.stderr.write(f"error: {wrong}\n")
        return 2
    return None
