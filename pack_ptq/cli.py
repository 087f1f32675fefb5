"""The command line: the typed functions of `commands`, read by jsonargparse."""

import errno
import inspect
import logging
import os
import sys
import threading
import time
import warnings
from typing import Any, NoReturn

import jsonargparse
import torch.distributed as dist

from pack_ptq.allocator import keep_freed_memory
from pack_ptq.commands import COMMANDS, compare, quantize
from pack_ptq.compare import plan_runs
from pack_ptq.configs.shipped import config_file
from pack_ptq.current_folder import make_importable
from pack_ptq.distributed import world
from pack_ptq.errors import UserError
from pack_ptq.models import ModelSource
from pack_ptq.null_keys import refuse_nulls, with_nulls
from pack_ptq.parse_errors import reword
from pack_ptq.trainers import is_first_process

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # TensorBoard's writer raises these as they are
PATIENCE = 10.0  # seconds
PARENT = os.getppid()  # read at the start: when a further process has something to tell, the first may be gone
OF_COMPARE: dict[str, dict[str, Any]] = {
    "--recipes": {
        "nargs": "+",
        "type": str,
        "required": True,
        "help": "names below configs/recipes (`pack-ptq configs` lists them), YAML files of your own, or `none` for "
        "the configuration alone; what a recipe states goes before the keys for every run",
    },
    "--seeds": {
        "nargs": "+",
        "type": int,
        "default": [0, 1, 2],
        "help": "of the runs of each recipe; a seed also draws the calibration images where the datamodule has a "
        "`calibration_seed`, unless that is given as a key",
    },
    "--out": {
        "type": str,
        "default": "runs/compare",
        "help": "folder of comparison.md, comparison.json and a run folder RECIPE-seedSEED for each run",
    },
}


def build_parser() -> jsonargparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = jsonargparse.ArgumentParser(
        prog="pack-ptq", description="Post-training quantization by Pack-PTQ.", exit_on_error=False
    )
    commands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        first = (function.__doc__ or "").splitlines()[0]
        sub = jsonargparse.ArgumentParser(description=first, exit_on_error=False)
        if function is quantize:
            help_of_config = "a YAML file, or the name of a shipped configuration; a further one overrides its keys"
            sub.add_argument("--config", action="config", help=help_of_config)
            # As an argument of the function, `model.class_path` would be taken for a subclass of ModelSource.
            sub.add_class_arguments(ModelSource, "model")
        if function is compare:
            sub.description = f"{first} Any further key of `pack-ptq quantize`, such as --config, goes to every run."
            for option, settings in OF_COMPARE.items():
                sub.add_argument(option, **settings)
        else:
            sub.add_function_arguments(function, as_positional=False, skip={"model"})
        commands.add_subcommand(name, sub, help=first)
    return parser


def _keys(arguments: list[str]) -> list[str]:
    function = COMMANDS.get(arguments[0] if arguments else "")
    if function is None:
        return list(COMMANDS)
    if function is compare:
        return [option.removeprefix("--") for option in OF_COMPARE]
    keys = list(inspect.signature(function).parameters)
    if function is quantize:
        keys += ["config", *(f"model.{name}" for name in inspect.signature(ModelSource).parameters)]
    return keys


def _with_config_files(arguments: list[str]) -> list[str]:
    resolved = list(arguments)
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            resolved[index + 1] = config_file(arguments[index + 1])
        elif argument.startswith("--config="):
            resolved[index] = f"--config={config_file(argument.removeprefix('--config='))}"
    return resolved


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part the options of `compare` from the keys for its runs."""
    parts: tuple[list[str], list[str]] = ([], [])
    is_key = False
    for argument in arguments:
        if argument.startswith("--"):
            is_key = argument.partition("=")[0] not in (*OF_COMPARE, "--help")
        parts[is_key].append(argument)
    return parts


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Give the command and its typed, checked arguments.

    Raises:
        UserError: Something the user gave cannot serve.
    """
    make_importable()
    own, keys = _split(arguments) if arguments[:1] == ["compare"] else (arguments, [])
    parser = build_parser()
    try:
        read = parser.parse_args(with_nulls(_with_config_files(own)))
        refuse_nulls(COMMANDS[read.command], read[read.command])
        chosen = parser.instantiate_classes(read)
    except jsonargparse.ArgumentError as error:
        raise UserError(reword(str(error), _keys(arguments))) from error
    values = dict(chosen[chosen.command])
    values.pop("config", None)
    if chosen.command == "compare":
        runs = plan_runs(keys, parse=lambda further: parse(["quantize", *further])[1], **values)
        values = {"runs": runs, "out": values["out"]}
    return chosen.command, values


def run(arguments: list[str]) -> None:
    """Run one command.

    Raises:
        UserError: Something the user gave cannot serve.
    """
    command, values = parse(arguments)
    COMMANDS[command](**values)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one message and status 2."""
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", module="lightning.*")
    threading.excepthook = _quiet_thread
    keep_freed_memory()
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        if world()[1] > 1:
            dist.destroy_process_group()
    except UserError as error:
        _tell(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _tell(f"run_dir: {error.strerror}; allowed: a folder on a disk with room")


def _tell(message: str) -> NoReturn:
    """End with a message; a further process stays silent if the first one, its parent, ends as well and has told."""
    waited = 0.0
    while not is_first_process() and os.getppid() == PARENT and waited < PATIENCE:
        time.sleep(0.1)
        waited += 0.1
    if is_first_process() or waited >= PATIENCE:
        print(f"pack-ptq: {message}", file=sys.stderr, flush=True)
    if world()[1] > 1:
        sys.stdout.flush()
        os._exit(2)  # the other processes may wait in a collective, on which an orderly end would wait, or abort
    raise SystemExit(2) from None


def _quiet_thread(failure: threading.ExceptHookArgs) -> None:
    """Leave it to `main` to tell that TensorBoard's thread found the disk full."""
    if not isinstance(failure.exc_value, OSError) or failure.exc_value.errno not in NO_ROOM:
        threading.__excepthook__(failure)
