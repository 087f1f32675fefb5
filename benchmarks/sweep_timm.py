"""Prepare and calibrate one member of every architecture of timm, and all classification models of torchvision.

python benchmarks/sweep_timm.py [--out runs/sweep] [--only NAME ...] [--again] [--seconds 240] [--gigabytes 10]

Random weights (see `sweep_weights`), the network's own input size, 16 generated images for calibration and 8 others to
compare the logits with 8-bit weights and activations to those in full precision. Each network has a process of its own;
its result is a line of OUT/results.jsonl, and what has one is not run again. The tables are docs/sweep_timm.md and
docs/sweep_timm.json.
"""

import argparse
import json
import math
import multiprocessing
import re
import resource
import signal
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from sweep_coverage import executed_products, unlisted
from sweep_summary import write_summary
from sweep_weights import generated_images, generated_noise, randomise
from torch import Tensor, nn

from pack_ptq import observe, plan_bits, prepare, set_ranges
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.types import QuantizerSpec, Recipe

MOST_PARAMETERS = 150e6
CALIBRATION, TEST = 16, 8
PIXELS = 4 * 512**2  # of one batch
NEAR = 1.2
NOISE = 0.01
SMALL = r"atto|femto|pico|nano|tiny|xxs|mini|_xs|_x+_small"
LARGE = r"large|huge|giant|gigantic|base|medium|so\d+m|(320|336|384|448|512|560)$"
Entry = dict[str, Any]


def build(library: str, model: str) -> nn.Module:
    return timm.create_model(model) if library == "timm" else torchvision.models.get_model(model, weights=None)


def input_shape(library: str, model: str) -> tuple[int, int, int]:
    """Give what the network's published weights were made for."""
    if library == "timm":
        return tuple(timm.get_pretrained_cfg(model).input_size)
    sizes = torchvision.models.get_model_weights(model).DEFAULT.transforms().crop_size
    return (3, sizes[0], sizes[0])


def entry(library: str, module: str, model: str) -> Entry:
    try:
        with torch.device("meta"):
            network = build(library, model)
    except Exception:  # some read numbers of what they make
        network = build(library, model)
    parameters = sum(p.numel() for p in network.parameters())
    shape = input_shape(library, model)
    return {"library": library, "module": module, "model": model, "parameters": parameters, "input": shape}


def smallest(members: list[Entry]) -> Entry:
    """Choose the smallest input among the members of nearly the fewest parameters."""
    fewest = min(member["parameters"] for member in members)
    near = [member for member in members if member["parameters"] <= NEAR * fewest]
    return min(near, key=lambda member: (member["input"][1], member["parameters"]))


def candidates(names: list[str]) -> list[str]:
    """Leave out names that speak of size, as long as others are left; building all 1,300 networks would take long."""
    names = [name for name in names if not re.search(LARGE, name)] or names
    small = [name for name in names if re.search(SMALL, name)]
    return small or names


def catalogue(cache: Path) -> list[Entry]:
    """Give one network per module of timm, but for timm's own test networks, and all of torchvision's."""
    chosen = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    known = {(c["library"], c["module"] if c["library"] == "timm" else c["model"]) for c in chosen}
    wanted = [("timm", module) for module in timm.list_modules()]
    wanted += [("torchvision", model) for model in torchvision.models.list_models(module=torchvision.models)]
    for library, name in wanted:
        if (library, name) in known:
            continue
        if library == "timm":
            names = [model for model in timm.list_models(module=name) if not model.startswith("test_")]
            chosen.append(smallest([entry("timm", name, model) for model in candidates(names)]))
        else:
            module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
            chosen.append(entry("torchvision", module, name))
        with cache.open("a") as file:
            file.write(json.dumps(chosen[-1]) + "\n")
    return chosen


def batches(images: Tensor) -> list[Tensor]:
    """Split into batches of at most 4, fewer of large images."""
    return list(images.split(max(1, min(4, PIXELS // images[0, 0].numel()))))


@torch.no_grad()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(batch).flatten(1).double() for batch in batches(images)])


def quantize(chain: Chain, images: list[Tensor]) -> None:
    """Give all layers and products 8 bits, and turn them on."""
    spec = QuantizerSpec(bits=8, observer="minmax")  # the search for the smallest error is for low widths
    recipe = Recipe(spec, QuantizerSpec(bits=8, per_channel=False))
    observe(chain, images)
    operands = [name for name in chain.quantizers if name not in chain.layers]
    set_ranges(chain, plan_bits([list(chain.layers)], [(8, 8)], recipe, [operands]), recipe)
    switch(chain.operations, "nearest", activations=True)


def compare(reference: Tensor, ours: Tensor) -> Entry:
    """Compare logits image by image, as they are and less the mean over the images; and tell how they vary."""
    mean = reference.mean(0)
    centred = torch.cosine_similarity(reference - mean, ours - mean, dim=1)
    return {
        "cosine": torch.cosine_similarity(reference, ours, dim=1).mean().item(),
        "cosine_without_mean": centred.mean().item(),
        "variation": ((reference - mean).square().mean().sqrt() / reference.square().mean().sqrt()).item(),
        "same_class": (reference.argmax(1) == ours.argmax(1)).double().mean().item(),
    }


def measure(library: str, model: str) -> Entry:
    """Prepare, calibrate and compare one network."""
    torch.manual_seed(0)
    network, shape = build(library, model), input_shape(library, model)
    calibration, test = generated_images(CALIBRATION, shape, 0), generated_images(TEST, shape, 1)
    randomise(network, calibration[:8], seed=0)
    reference = logits(network, test)
    shaken = logits(network, test + NOISE * generated_noise(test))
    if not torch.isfinite(reference).all():
        return {"status": "crashed", "reason": "the random weights give NaN or infinity in full precision"}
    try:
        ready = prepare(network, calibration[:2])
        quantize(ready.chain, batches(calibration))
    except UserError as error:
        return {"status": "refused", "reason": str(error)}
    coverage = executed_products(ready.chain.network, test[:1])
    return {
        "status": "prepared",
        "links": len(ready.chain),
        "layers": len(ready.chain.layers),
        "products": len(ready.chain.products),
        "left_out": list(ready.left_out),
        "unlisted": unlisted(coverage, ready.left_out),
        "macs": coverage.macs,
        "outside": [[*key, macs] for key, macs in coverage.outside.items()],
        **compare(reference, logits(ready.chain.network, test)),
        "cosine_with_noise": compare(reference, shaken)["cosine"],
    }


def _child(pipe: Connection, chosen: Entry, seconds: float, gigabytes: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds),) * 2)
    warnings.simplefilter("ignore")
    try:
        result = measure(chosen["library"], chosen["model"])
    except Exception as error:
        where = "".join(traceback.format_exception(error)[-6:])
        result = {"status": "crashed", "reason": f"{type(error).__name__}: {error}", "traceback": where}
    pipe.send({**result, "seconds": round(time.process_time(), 1)})


def run(chosen: Entry, seconds: float, gigabytes: float) -> Entry:
    """Measure a network in a process of its own, which inherits the imports."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, chosen, seconds, gigabytes))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
        process.join()
    except EOFError:
        process.join()
        late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        limit = f"{seconds:g} seconds of processor time" if late else f"{gigabytes:g} GB"
        result = {"status": "stopped", "reason": f"the process died, probably of the limit of {limit}"}
    return {**chosen, **result}


def finished(results: Path) -> dict[tuple[str, str], Entry]:
    """Give the last result of each network."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {(line["library"], line["model"]): line for line in map(json.loads, lines)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--only", nargs="*", help="names of models or modules")
    parser.add_argument("--again", action="store_true", help="also run what has a result")
    parser.add_argument("--seconds", type=float, default=240, help="of processor time for each network")
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    chosen = catalogue(arguments.out / "catalogue.jsonl")
    done = finished(results)
    for network in sorted(chosen, key=lambda c: (c["library"], c["parameters"] * c["input"][1] ** 2)):
        key, too_large = (network["library"], network["model"]), network["parameters"] > MOST_PARAMETERS
        wanted = not arguments.only or {network["model"], network["module"]} & set(arguments.only)
        if not wanted or (key in done and not arguments.again):
            continue
        skipped = {**network, "status": "skipped", "reason": f"more than {MOST_PARAMETERS:.0f} parameters"}
        result = skipped if too_large else run(network, arguments.seconds, arguments.gigabytes)
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        outcome = f"{result['cosine']:.4f}" if "cosine" in result else result["reason"][:150]
        write_summary(chosen, finished(results), arguments.docs)
        print(*key, result["status"], outcome, result.get("unlisted", ""), result.get("seconds", 0), flush=True)
    write_summary(chosen, finished(results), arguments.docs)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not live through a fork
    main()
