# SPDX-License-Identifier: Apache-2.0
"""Turn dataclasses, the run's and the recipe's, into one command line."""

import dataclasses
import difflib
import math
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from .errors import UserError, say
from .launch import rank, settle_variables
from .lifetime import begin

# Names that users may try for our flags, and whose spelling is too different for difflib.
ALIASES = {"--lr": "--learning_rate", "--wd": "--weight_decay", "--max_torn": "--max_undecodable"}


class Range(NamedTuple):
    """The values that a field may have, both ends included: `epochs: Annotated[int, Range(1)]`."""

    low: float
    high: float = math.inf


Positive = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0, sys.float_info.max)]
Fraction = Annotated[float, Range(0, 1)]


@dataclass
class RunConfig:
    """A run's settings. Only the seed affects what is learned; the others may change on resume."""

    _argument_group_name = "run"
    seed: Annotated[int, Range(0, 2**63 - 1)] = HfArg(default=0, help="decides weights, sample order and augmentation")
    num_workers: Natural = HfArg(
        default=2, help="loader processes per training process; 0 decodes in the training loop"
    )
    max_steps: Natural = HfArg(default=0, help="stop after this many steps, schedule unchanged; 0 = run all epochs")
    logging_steps: Positive = HfArg(default=10, help="steps between two lines of metrics.jsonl")
    output_dir: str = HfArg(default="", help="the run's folder; empty = runs/<recipe>-<hash of the configuration>")
    checkpointing_steps: str = HfArg(default="epoch", help="steps between checkpoints, or the word epoch")
    resume_from_checkpoint: str = HfArg(default="auto", help="auto = newest in output_dir, never, or a checkpoint")
    resume_override: str = HfArg(default="", help="values, by name, that a resume may change: learning_rate,epochs")
    keep_checkpoints: Annotated[int, Range(2)] = HfArg(
        default=2, help="newest checkpoints to keep; the best one stays besides"
    )
    async_checkpoint: bool = HfArg(default=False, help="train on while a copy of the state is written")
    time_limit: NonNegative = HfArg(
        default=0.0, help="seconds until the run saves and ends; 0 = Slurm's job end, if any"
    )
    on_nonfinite: Literal["stop", "skip"] = HfArg(default="stop", help="what a gradient with nan or inf does")
    report_to: str = HfArg(
        default="tensorboard", help="trackers: tensorboard, wandb, mlflow, comma-separated, or none"
    )
    profile: bool = HfArg(default=False, help="trace the first epoch's last steps and first evaluation batches")

    def identity(self) -> dict:
        """Return the fields that affect what is learned."""
        return {"seed": self.seed}


SIZES = ("tensor_parallel_size", "pipeline_parallel_size")  # fields of recipes that split the network in code


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}. `--help` lists every flag with its default.")

    def format_help(self) -> str:
        """List the flags by group: data, model, training (from the field `epochs` on), run."""
        wrapper = textwrap.TextWrapper(min(100, shutil.get_terminal_size().columns), " " * 6, " " * 6)
        lines = [f"usage: {self.prog} [--flag value] ...", "below: --flag [its values] default"]
        for kind in (*self.dataclass_types[1:], self.dataclass_types[0]):
            hints = get_type_hints(kind, include_extras=True)
            group = getattr(kind, "_argument_group_name", "model" if "epochs" in hints else "settings")
            for number, field in enumerate(dataclasses.fields(kind)):
                if number == 0 or field.name == "epochs":
                    lines += ["", "training" if field.name == "epochs" else group]
                default = str(field.default).lower() if isinstance(field.default, bool) else field.default
                lines += [f"  --{field.name} [{_values(hints[field.name])}] {default or repr(default)}"]
                lines += wrapper.wrap(field.metadata["help"])
        return "\n".join([*lines, ""])


def _values(hint) -> str:
    """Describe the values that a type allows, for `--help`."""
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    if not hasattr(hint, "__metadata__"):
        return {bool: "true, false", str: "text"}.get(hint, "a number")
    low, high = hint.__metadata__[0]
    return f"{low:g} to {high:g}" if high < 2**53 else f"{low:g} or more"


def parse(*config_classes: type, arguments: list[str] | None = None) -> tuple:
    """Read the command line into one object of each class.

    arguments: the words to parse. None: those of this program, whose process is prepared too (see lifetime.begin).
    """
    if arguments is None:
        begin()
        settle_variables()
        arguments = sys.argv[1:]
    if "--help" in arguments and rank():
        sys.exit(0)
    parser = _Parser(config_classes, allow_abbrev=False)
    *configs, unknown = parser.parse_args_into_dataclasses(
        expand_home(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in unknown:
        raise UserError(_unknown(argument.split("=")[0], known))
    for config in configs:
        _check_bounds(config)
        _fit_warmup(config, sys.argv[1:] if arguments is None else arguments)
    return tuple(configs)


def _unknown(argument: str, known: list[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument} belongs to no flag. `--help` lists every flag with its default."
    flag = "--" + argument.lstrip("-").replace("-", "_")
    alike = [option for option in known if option in (ALIASES.get(flag), flag) or option.startswith(flag)]
    nearest = (alike or difflib.get_close_matches(flag, known, 1, 0))[0]
    return f"unknown flag {argument}. The nearest is {nearest}; `--help` lists every flag."


def _check_bounds(config) -> None:
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for bounds in getattr(hint, "__metadata__", ()):
            low, high, value = *bounds, getattr(config, name)
            if not low <= value <= high:
                raise UserError(f"--{name} {value} is out of range. Give a value from {low:g} to {high:g}.")


def _fit_warmup(config, words: list[str]) -> None:
    """Shorten a default warmup that leaves the learning rate no time to fall, and say so.

    Raises UserError for one that was given as a flag.
    """
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    if not {"warmup_epochs", "epochs"} <= fields.keys() or config.warmup_epochs < config.epochs:
        return
    given = any(word.split("=")[0] in ("--warmup_epochs", "--warmup-epochs") for word in words)
    shorter = fields["warmup_epochs"] * config.epochs / fields["epochs"]
    if given or shorter >= config.epochs:
        raise UserError(
            f"--warmup_epochs {config.warmup_epochs:g} leaves nothing of --epochs {config.epochs} for the learning "
            f"rate to fall. Give less than {config.epochs}."
        )
    config.warmup_epochs = shorter
    if rank() == 0:  # the first line on standard output is the run's folder
        share = f"as {fields['warmup_epochs']:g} of {fields['epochs']} by default"
        say(f"the warmup takes {shorter:g} of {config.epochs} epochs, {share}; see --warmup_epochs", sys.stderr)


def expand_home(words: list[str]) -> list[str]:
    """Expand `~` in the words of a command line, in `--flag=~/x` too.

    Raises UserError for an unknown home folder, and for text that is not UTF-8, which trackers cannot write.
    """
    expanded = [_expand_home(word) for word in words]
    for text in (*expanded, os.getcwd()):
        if text != text.encode(errors="replace").decode():
            shown = text.encode("ascii", "backslashreplace").decode()
            raise UserError(f"{shown} is not UTF-8. Rename it (mv), or give a symbolic link to it.")
    return expanded


def _expand_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise UserError(f"{value}: this home folder is not known. Set HOME, or give the whole path (or ./{value}).")
    return flag + equals + expanded
