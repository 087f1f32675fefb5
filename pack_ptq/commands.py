"""What the command line can do: one typed function for each command."""

from collections.abc import Callable

import jsonargparse

from pack_ptq import api
from pack_ptq.callbacks import BitAssignment, Evaluation, HessianScoring, NoPacking, Packing, UniformBits
from pack_ptq.compare import ComparedRun, run_all
from pack_ptq.configs.shipped import listing
from pack_ptq.datamodules import PTQData
from pack_ptq.models import ModelSource
from pack_ptq.report import render
from pack_ptq.trainers import is_first_process
from pack_ptq.types import Hardware, Recipe


def quantize(
    model: ModelSource,
    data: PTQData,
    recipe: Recipe = Recipe(),  # noqa: B008
    scoring: HessianScoring = HessianScoring(),  # noqa: B008
    packing: Packing = NoPacking(),  # noqa: B008
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
        seed: Of every random choice but those with a seed of their own (calibration images, random packs), 0 or more.
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


def compare(runs: list[ComparedRun], out: str) -> None:
    """Run several recipes on one network over several seeds, and write their accuracy with its spread.

    Args:
        runs: As `plan_runs` gives them.
        out: Folder of the runs and of the comparison.
    """
    text = run_all(runs, out)
    if is_first_process():
        print(f"\n{text}\ncomparison   {out}/comparison.md, {out}/comparison.json")


def configs() -> None:
    """List the shipped configurations, and the recipes to put behind one."""
    for title, recipes in (
        ("networks: --config NAME", False),
        ("recipes, behind a network: --config NAME --config RECIPE", True),
    ):
        print(title)
        for name, first in listing(recipes).items():
            print(f"  {name:32s} {first}")


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "evaluate": evaluate,
    "report": report,
    "compare": compare,
    "configs": configs,
}
