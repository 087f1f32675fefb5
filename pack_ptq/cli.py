"""The command line: a dictionary of typed functions, read by jsonargparse."""

import errno
import inspect
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

import jsonargparse
import torch.distributed as dist

from pack_ptq import api
from pack_ptq.callbacks import BitAssignment, Evaluation, HessianPacking, HessianScoring, Packing, UniformBits
from pack_ptq.datamodules import PTQData
from pack_ptq.distributed import world
from pack_ptq.errors import UserError, refuse
from pack_ptq.models import ModelSource
from pack_ptq.parse_errors import reword
from pack_ptq.report import render
from pack_ptq.trainers import is_first_process
from pack_ptq.types import Hardware, Recipe

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # TensorBoard's writer raises these as they are
PATIENCE = 10.0  # seconds


def quantize(
    model: ModelSource,
    data: PTQData,
    recipe: Recipe = Recipe(),  # noqa: B008
    scoring: HessianScoring = HessianScoring(),  # noqa: B008
    packing: Packing = HessianPacking(),  # noqa: B008
    bits: BitAssignment = UniformBits(),  # noqa: B008
    evaluation: Evaluation = Evaluation(),  # noqa: B008
    hardware: Hardware = Hardware(),  # noqa: B008
    seed: int = 0,
    run_dir: str | None = None,
) -> None:
    """Quantize a network and measure it.

    Args:
        model: Where the network comes from.
        data: Calibration and test samples.
        recipe: Bits, protocol, profile and effort.
        scoring: How blocks are scored.
        packing: How blocks are packed.
        bits: How packs get their bits.
        evaluation: How the network is measured.
        hardware: Where to run.
        seed: Of every random choice, 0 or more.
        run_dir: Folder of the run; `runs/<network>-<bits>-seed<seed>` if not given.
    """
    folder = run_dir or str(api.default_run_dir(api.configuration(model, data, recipe, {}, hardware, seed)))
    result = api.quantize(
        model, data, recipe, scoring, packing, bits, evaluation, hardware, seed, folder, show=True
    )  # fmt: skip
    if is_first_process():
        print(render(result, folder))


def evaluate(run_dir: str, hardware: Hardware = Hardware()) -> None:  # noqa: B008
    """Measure the quantized network of a run again, on the test samples of its configuration.

    Args:
        run_dir: Folder of the run.
        hardware: Where to run.
    """
    _, config = api.open_finished(run_dir)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=PTQData)
    data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    values = api.evaluate(run_dir, data, hardware=hardware)
    if is_first_process():
        print("  ".join(f"{name} {value:.2f}" for name, value in values.items()))


def report(run_dir: str) -> None:
    """Show the report of a finished run.

    Args:
        run_dir: Folder of the run.
    """
    print(render(api.read_report(run_dir), run_dir))


def configs() -> None:
    """List the shipped configurations."""
    root = Path(str(files("pack_ptq.configs")))
    for path in sorted(root.rglob("*.yaml")):
        first = path.read_text().splitlines()[0].lstrip("# ")
        print(f"{path.relative_to(root).with_suffix('').as_posix():32s} {first}")


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "evaluate": evaluate,
    "report": report,
    "configs": configs,
}


def config_file(name: str) -> str:
    """Give the file of a shipped configuration by its name, or of the user's own by its path.

    Raises:
        UserError: There is neither.
    """
    if Path(name).is_file():
        return name
    shipped = Path(str(files("pack_ptq.configs"))) / f"{name}.yaml"
    if not shipped.is_file():
        raise refuse("config", name, "a YAML file, or a name that `pack-ptq configs` lists")
    return str(shipped)


def build_parser() -> jsonargparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = jsonargparse.ArgumentParser(
        prog="pack-ptq", description="Post-training quantization by Pack-PTQ.", exit_on_error=False
    )
    commands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=(function.__doc__ or "").splitlines()[0], exit_on_error=False)
        if name == "quantize":
            sub.add_argument("--config", action="config", help="a YAML file, or the name of a shipped configuration")
            # As an argument of the function, `model.class_path` would be taken for a subclass of ModelSource.
            sub.add_class_arguments(ModelSource, "model")
        sub.add_function_arguments(function, as_positional=False, skip={"model"})
        commands.add_subcommand(name, sub, help=(function.__doc__ or "").splitlines()[0])
    return parser


def _keys(arguments: list[str]) -> list[str]:
    function = COMMANDS.get(arguments[0] if arguments else "")
    if function is None:
        return list(COMMANDS)
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


def run(arguments: list[str]) -> None:
    """Run one command.

    Raises:
        UserError: Something the user gave cannot serve.
    """
    parser = build_parser()
    try:
        config = parser.parse_args(_with_config_files(arguments))
        chosen = parser.instantiate_classes(config)
    except jsonargparse.ArgumentError as error:
        raise UserError(reword(str(error), _keys(arguments))) from error
    values = dict(chosen[chosen.command])
    values.pop("config", None)
    COMMANDS[chosen.command](**values)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one message and status 2."""
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", module="lightning.*")
    threading.excepthook = _quiet_thread
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
    parent, waited = os.getppid(), 0.0
    while not is_first_process() and os.getppid() == parent and waited < PATIENCE:
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
