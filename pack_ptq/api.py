"""The whole story: a trained network and calibration samples in, a measured low-bit network out."""

import copy
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import default_collate

from pack_ptq.callbacks import BitAssignment, Evaluation, HessianScoring, NoPacking, Packing, UniformBits
from pack_ptq.datamodules import PTQData
from pack_ptq.describe import describe, describe_model
from pack_ptq.digests import network_digest
from pack_ptq.distributed import barrier
from pack_ptq.errors import UserError, refuse
from pack_ptq.graph.gradients import check_gradients
from pack_ptq.graph.norms import put_norms
from pack_ptq.graph.prepare import Prepared, prepare
from pack_ptq.graph.switch import switch
from pack_ptq.matmul_precision import matmul_precision
from pack_ptq.measurements import Measurements
from pack_ptq.models import LoadedModel, ModelSource
from pack_ptq.models.finite import check_activations, check_finite
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.modules.tuning import check_tuning
from pack_ptq.pipeline import Pipeline
from pack_ptq.reconstruct import check_cache, check_granularity
from pack_ptq.report import bit_summary, mixed_summary, peak_memory, render, size_summary, split_summary
from pack_ptq.runs import RunFolder
from pack_ptq.selections import Selection, find_selections
from pack_ptq.states import put_rest_state, put_tuned_state, put_unit_state
from pack_ptq.trainers import check_hardware, is_first_process, make_trainer
from pack_ptq.types import (
    SEEDS,
    SEEDS_IN_WORDS,
    Hardware,
    Plan,
    Preprocessing,
    Recipe,
    TuningResult,
    TuningSpec,
    UnitResult,
)

PACKAGES = ("pack-ptq", "torch", "torchvision", "lightning", "torchmetrics", "timm")
WEIGHTS = ("pretrained", "checkpoint")  # which a run folder makes needless


@matmul_precision("highest")  # but for the steps of fits
def quantize(
    model: ModelSource | nn.Module,
    data: PTQData,
    recipe: Recipe | None = None,
    scoring: HessianScoring | None = None,
    packing: Packing | None = None,
    bits: BitAssignment | None = None,
    evaluation: Evaluation | None = None,
    hardware: Hardware | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    show: bool = False,
    measurements: str | Path | None = None,
) -> dict[str, Any]:
    """Quantize a network by Pack-PTQ and measure it; the command `pack-ptq quantize` in Python.

    A killed run resumes at the next unit when the same call is made again, and ends as if it had never stopped.

    Args:
        model: Where the network comes from, or a trained network itself.
        data: Calibration and test samples.
        recipe: Bits, protocol, profile and effort.
        scoring: How blocks are scored.
        packing: How blocks are packed.
        bits: How packs get their bits.
        evaluation: How the network is measured.
        hardware: Where to run.
        seed: Of every random choice but those with a seed of their own (calibration images, random packs), 0 or more.
        run_dir: Folder of the run; `runs/<network>-<bits>-seed<seed>` if not given.
        show: Whether to tell what happens on the screen.
        measurements: Folder that several runs share: what one has measured, another on the very same network and
            samples reads, such as full precision.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: Something the user gave cannot serve; the message names the key, the value and what is allowed.
    """
    began = time.perf_counter()
    recipe, hardware = recipe or Recipe(), hardware or Hardware()
    scoring, packing = scoring or HessianScoring(), packing or NoPacking()
    bits, evaluation = bits or UniformBits(), evaluation or Evaluation()
    bits.recipe = recipe
    if seed not in SEEDS:
        raise refuse("seed", seed, SEEDS_IN_WORDS)
    check_hardware(hardware)
    L.seed_everything(seed, verbose=False)
    if isinstance(model, nn.Module):
        loaded, blocks = in_hand(model), None
        check_finite(model)
    else:
        loaded, blocks = model.load(), model.blocks
    data.use_preprocessing(loaded.preprocessing)
    data.check()
    check_shares(data, hardware)
    prepared = prepare_for(loaded.network, data, blocks)
    if recipe.steps or recipe.tuning_steps:
        check_gradients(prepared.chain, example_of(data))
    check_cache(prepared.chain, data.batch_size, recipe.reconstruction.cache_bytes)
    check_granularity(prepared.chain, recipe.reconstruction)
    check_tuning(prepared.chain, recipe, smallest_share(data, hardware))
    parts = {"scoring": scoring, "packing": packing, "bits": bits, "evaluation": evaluation}
    config = configuration(model, data, recipe, parts, hardware, seed)
    folder = RunFolder(run_dir or default_run_dir(config))
    samples = data.fingerprint()
    if is_first_process():
        folder.claim({"config": config, "model": network_digest(loaded.network), "data": samples})
    if folder.report.exists():
        return read_report(folder.path)
    shared = None
    if measurements is not None:
        conditions = (samples, *(repr(config[key]) for key in ("model", "data", "evaluation", "hardware")))
        shared = Measurements(Path(measurements), conditions)
    pipeline = Pipeline(prepared.chain, data, recipe, evaluation, hardware, seed, folder, show, shared)
    pipeline.start_processes()
    full = pipeline.measure("full_precision", "off")
    try:
        plan = pipeline.plan(scoring, packing, bits)
    except UserError:
        if is_first_process():
            folder.release()
        raise
    nearest = pipeline.measure("rounded_to_nearest", "nearest")
    results = pipeline.reconstruct(plan)
    tuning = pipeline.tune()
    final = pipeline.measure("quantized", "hard")
    selections = find_selections(prepared.chain, example_of(data))
    metrics = {"full_precision": full, "rounded_to_nearest": nearest, "quantized": final}
    measured = json.loads(folder.measured.read_text())
    metrics["num_samples"] = measured["num_samples"]
    fidelity, seconds = measured.get("fidelity", {}), time.perf_counter() - began
    report = compose_report(
        config, prepared, plan, results, tuning, metrics, fidelity, selections, pipeline.device, seconds
    )
    if is_first_process():
        folder.write_json(folder.report, report)
        pipeline.logger.experiment.add_text("report", f"<pre>{render(report, str(folder.path))}</pre>")
        pipeline.logger.finalize("success")
    barrier()
    return report


def configuration(
    model: ModelSource | nn.Module,
    data: PTQData,
    recipe: Recipe,
    parts: dict[str, L.Callback],
    hardware: Hardware,
    seed: int,
) -> dict[str, Any]:
    """Give all settings of a run as plain values, as `config.yaml` holds them."""
    return {
        "model": describe_model(model),
        "data": describe(data),
        "recipe": json.loads(json.dumps(asdict(recipe))),
        **{name: describe(part) for name, part in parts.items()},
        "hardware": asdict(hardware),
        "seed": seed,
    }


def default_run_dir(config: dict[str, Any]) -> Path:
    """Give `runs/<network>-<bits>-seed<seed>`."""
    name = config["model"].get("name") or config["model"]["class_path"].rsplit(".", 1)[-1]
    bits = f"w{config['recipe']['weight']['bits']}a{config['recipe']['activation']['bits']}"
    return Path("runs") / f"{name.replace('/', '-')}-{bits}-seed{config['seed']}"


def in_hand(network: nn.Module) -> LoadedModel:
    """Take a network as an object; one in half precision, whose roundings could not be fitted, as a copy in float32."""
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in network.parameters()):
        network = copy.deepcopy(network).float()
    return LoadedModel(network, getattr(network, "preprocessing", None))


def prepare_for(network: nn.Module, data: PTQData, blocks: str | list[str] | None = None) -> Prepared:
    """Prepare a copy of a network on samples of its data, and check that its output fits the task.

    Raises:
        UserError: The network does not run on the samples, or gives something else than the task needs.
    """
    example = example_of(data)
    if any(t.device.type != "cpu" for t in (*network.parameters(), *network.buffers())):
        network = copy.deepcopy(network).cpu()  # the user's own stays where it is
    check_activations(network, example)
    prepared = prepare(network, example, blocks)
    with torch.no_grad():
        data.check_output(prepared.chain.network(example))
    return prepared


def example_of(data: PTQData) -> Tensor:
    """Give the first two calibration inputs, or the only one."""
    dataset: Any = data.calibration_dataset()
    return default_collate([dataset[i][0] for i in range(min(2, len(dataset)))])


def check_shares(data: PTQData, hardware: Hardware) -> None:
    """Refuse more processes than there are samples, for one without any would wait for ever.

    Raises:
        UserError: There are too few calibration or test samples.
    """
    datasets: list[Any] = [data.calibration_dataset(), data.test_dataset()]
    samples = min(len(dataset) for dataset in datasets)
    if hardware.devices > samples:
        raise refuse("hardware.devices", hardware.devices, f"1 to {samples}, the number of samples")


def smallest_share(data: PTQData, hardware: Hardware) -> int:
    """Give the calibration samples of the process that has the fewest."""
    dataset: Any = data.calibration_dataset()
    return len(dataset) // hardware.devices


def compose_report(
    config: dict[str, Any],
    prepared: Prepared,
    plan: Plan,
    results: list[UnitResult],
    tuning: TuningResult | None,
    metrics: dict[str, Any],
    fidelity: dict[str, dict[str, float]],
    selections: list[Selection],
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Give the content of `report.json`."""
    recipe = config["recipe"]
    return {
        **{key: config[key] for key in ("model", "data", "seed", "recipe", "scoring", "packing")},
        "protocol": recipe["protocol"],
        "profile": recipe["profile"],
        "versions": {package: version(package) for package in PACKAGES},
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processes": config["hardware"]["devices"],
        "metrics": metrics,
        "fidelity": fidelity,
        "bits": bit_summary(prepared.chain, list(plan.units), plan.bits) | mixed_summary(plan.mixed),
        "size_bytes": size_summary(prepared.chain, plan.bits),
        "packs": [list(unit.blocks) for unit in plan.units if unit.kind == "pack"],
        "scores": dict(zip(plan.scores.names, plan.scores.scores, strict=True)),
        "reconstruction": [result.to_json() for result in results],
        "tuning": None if tuning is None else tuning.to_json(),
        "folded": list(prepared.folded),
        "split_channels": split_summary(prepared.chain),
        "left_out": list(prepared.left_out),
        "selections": [asdict(selection) for selection in selections],
        "seconds": {
            **plan.seconds,
            "reconstruction": {
                "per_pack": {result.name: result.seconds for result in results},
                "total": sum(result.seconds for result in results),
            },
            "tuning": 0.0 if tuning is None else tuning.seconds,
            "total": seconds,
        },
        "peak_memory_bytes": peak_memory(),
    }


def load(run_dir: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Load the quantized network of a run that has reconstructed all its units, and tuned them if it was to.

    The original checkpoint is not needed: codes, scales and the rest are in the folder.

    Args:
        run_dir: Folder of the run.
        network: One of the same class, if the run was given a network as an object and not a model source.

    Returns:
        The network with hard integer codes, in evaluation mode, on the CPU; it gives the outputs the run measured.

    Raises:
        UserError: The folder holds no finished run, or the network's class must be given.
    """
    return load_prepared(run_dir, network)[0].chain.network


def load_prepared(run_dir: str | Path, network: nn.Module | None = None) -> tuple[Prepared, Preprocessing | None]:
    """Load like `load`, and give the chain of the network and how it wants its input, too."""
    folder, config = open_finished(run_dir)
    plan = Plan.from_json(json.loads(folder.plan.read_text()))
    if network is None:
        source = ModelSource(**{key: value for key, value in config["model"].items() if key not in WEIGHTS})
        loaded = source.load()
    else:
        loaded = in_hand(network)
    prepared = prepare(loaded.network, torch.randn(2, *plan.input_shape), config["model"].get("blocks"))
    if folder.norms.exists():  # older runs have none
        put_norms(prepared.chain, folder.read_tensors(folder.norms))
    put_rest_state(prepared.chain.network, folder.read_tensors(folder.network))
    for index in range(len(plan.units)):
        put_unit_state(prepared.chain, folder.read_tensors(folder.pack(index)))
    if folder.tuned.exists():
        put_tuned_state(prepared.chain, folder.read_tensors(folder.tuned))
    switch(prepared.chain.operations, "hard", activations=True)
    return prepared, loaded.preprocessing


def open_finished(run_dir: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    """Open the folder of a run whose units are all reconstructed, and tuned if its recipe says so.

    Raises:
        UserError: There is no such run in the folder.
    """
    folder = RunFolder(run_dir)
    if not folder.plan.exists() or not folder.config.exists():
        raise refuse("run_dir", str(run_dir), "the folder of a run of `pack-ptq quantize`")
    units = json.loads(folder.plan.read_text())["units"]
    missing = [index for index in range(len(units)) if not folder.pack(index).exists()]
    if missing:
        raise refuse("run_dir", str(run_dir), f"a finished run; {len(missing)} of {len(units)} units are still to do")
    config = yaml.safe_load(folder.config.read_text())
    tuning = TuningSpec(**config["recipe"].get("tuning", {"steps": 0}))  # older runs have none
    if Recipe(budget=config["recipe"]["budget"], tuning=tuning).tuning_steps and not folder.tuned.exists():
        raise refuse("run_dir", str(run_dir), "a finished run; its units are done, but their tuning is still to do")
    return folder, config


def read_report(run_dir: str | Path) -> dict[str, Any]:
    """Read the report of a finished run.

    Raises:
        UserError: The folder holds none.
    """
    folder = RunFolder(run_dir)
    if not folder.report.exists():
        raise refuse("run_dir", str(run_dir), "the folder of a finished run (it holds report.json)")
    return json.loads(folder.report.read_text())


@matmul_precision("highest")
def evaluate(
    run_dir: str | Path,
    data: PTQData,
    evaluation: Evaluation | None = None,
    hardware: Hardware | None = None,
    network: nn.Module | None = None,
) -> dict[str, float]:
    """Measure the quantized network of a run on the test samples of `data`, in percent.

    Args:
        run_dir: Folder of the run.
        data: Test samples.
        evaluation: How to measure.
        hardware: Where to run.
        network: As for `load`.
    """
    evaluation = evaluation or Evaluation()
    check_hardware(hardware or Hardware())
    prepared, preprocessing = load_prepared(run_dir, network)
    data.use_preprocessing(preprocessing)
    data.check()
    check_shares(data, hardware or Hardware())
    data.check_output(prepared.chain.network(torch.zeros(1, *prepared.chain.input_shape)))
    make_trainer(hardware or Hardware(), [evaluation]).test(WholeNetwork(prepared.chain), data, verbose=False)
    return evaluation.values
