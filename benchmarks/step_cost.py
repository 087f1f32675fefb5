"""Time and memory of a step on one block, transformers beside CNNs; and stages of a run by the number of blocks.

python benchmarks/step_cost.py [--batch-size 16] [--steps 3] [--repeats 5] [--depths 6 12 24]

First table: forward, backward and Adam on the middle block, by the default recipe without corrections of biases (`fit`)
and AIQViT's search for ranks (`search`), beside the same block's training in full precision in the same repeat. Memory
is what autograd holds for the backward pass. Second table: the stages of a small ViT's run by its depth, with two steps
a unit.
"""

import argparse
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from pack_ptq import inner_links, observe, plan_bits, prepare, reconstruct, score_blocks, set_ranges, tile_units
from pack_ptq.compensation import linear_layers, low_rank_candidates
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, unit_part
from pack_ptq.graph.switch import switch
from pack_ptq.modules.rank_search import RankSearch
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.packing import fixed_packs
from pack_ptq.types import LowRankSpec, QuantizerSpec, Recipe, ReconstructionSpec, TuningSpec

NETWORKS = ("resnet18", "resnet50", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
STEPS = 1000  # which the schedules span
MIDDLE = 500
Loss = Callable[[], Tensor]


def calibrated(network: nn.Module, x: Tensor, steps: int) -> tuple[Chain, Recipe]:
    """Prepare a network, with 4 bits everywhere."""
    spec, tuning = ReconstructionSpec(steps=steps), TuningSpec(steps=0)
    recipe = Recipe(QuantizerSpec(bits=4), QuantizerSpec(bits=4, per_channel=False), reconstruction=spec, tuning=tuning)
    chain = prepare(network.eval(), x).chain
    observe(chain, [x])
    operands = [name for name in chain.quantizers if name not in chain.layers]
    set_ranges(chain, plan_bits([list(chain.layers)], [(4, 4)], recipe, [operands]), recipe)
    return chain, recipe


def held(loss: Loss) -> int:
    """Give the bytes of all tensors that autograd saves for one backward pass, those that share memory once."""
    storages = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        value = loss()
    del value
    return sum(storage.nbytes() for storage in storages.values())


def seconds(loss: Loss, variables: list[Tensor], steps: int) -> float:
    """Time a step, after one that is not timed."""
    optimizer = torch.optim.Adam(variables, lr=1e-5)
    passed = 0.0
    for step in range(1 + steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        passed += (time.perf_counter() - began) if step else 0.0
    return passed / steps


def in_full_precision(part: Part, x: Tensor, target: Tensor, steps: int) -> tuple[float, int]:
    switch(part.operations, "off", activations=False)
    weights = [layer.layer.weight.requires_grad_(True) for layer in part.layers.values()]

    def loss() -> Tensor:
        return (part.run(x.clone().requires_grad_(True)) - target).square().mean()

    measured = seconds(loss, weights, steps), held(loss)
    for weight in weights:
        weight.requires_grad_(False)
    return measured


def fit(part: Part, x: Tensor, target: Tensor, steps: int) -> tuple[float, int]:
    errors = [1.0] * len(part.layers)
    module = PackReconstruction(part, ReconstructionSpec(steps=STEPS, bias_lr=0.0), STEPS, seed=0, errors=errors)
    module.begin(torch.device("cpu"))

    def loss() -> Tensor:
        return module.training_step((x, x.clone(), target), MIDDLE)

    measured = seconds(loss, [p for p in module.parameters() if p.requires_grad], steps), held(loss)
    module.end()
    return measured


def search(part: Part, x: Tensor, target: Tensor, steps: int) -> tuple[float, int]:
    spec, generator = LowRankSpec(search_steps=STEPS), torch.Generator().manual_seed(0)
    module = RankSearch(part, low_rank_candidates(part, spec, generator), spec, STEPS, seed=0)

    def loss() -> Tensor:
        return module.training_step((x, x, target), 0)

    return seconds(loss, module.factors, steps), held(loss)


def row(name: str, arguments: argparse.Namespace) -> str:
    """Measure the middle block of a network, with what really reaches it."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    x = torch.randn(arguments.batch_size, *timm.get_pretrained_cfg(name).input_size)
    chain, _ = calibrated(network, x, STEPS)
    first, stop = inner_links(chain)
    units = tile_units(chain, fixed_packs(stop - first, 1))
    unit = units[len(units) // 2]
    with torch.no_grad():
        inputs = chain.run(x, 0, unit.start)
        target = chain.run(inputs, unit.start, unit.stop).clone()
    part = unit_part(chain, unit, unit.name)
    ways = [in_full_precision, fit, *([search] if linear_layers(part) else [])]
    found = [[way(part, inputs, target, arguments.steps) for way in ways] for _ in range(arguments.repeats)]
    plain = statistics.median(each[0][0] for each in found)
    cells = [name, unit.name, f"{plain * 1000:.0f} ms, {found[0][0][1] / 2**20:.0f} MiB"]
    for way in range(1, len(ways)):
        ratios = [each[way][0] / each[0][0] for each in found]
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells.append(f"{times}, {found[0][way][1] / found[0][0][1]:.2f}")
    return "| " + " | ".join(cells + [""] * (5 - len(cells))) + " |"


def by_depth(depth: int) -> str:
    """Time every stage of a run, and give it a block."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 64, 64)
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=depth)
    times = [time.perf_counter()]
    chain, recipe = calibrated(network, x, 2)
    times.append(time.perf_counter())
    start, stop = inner_links(chain)
    score_blocks(chain, [x], start, stop)
    times.append(time.perf_counter())
    units = tile_units(chain, fixed_packs(stop - start, 1))
    reconstruct(chain, units, [x], recipe)
    times.append(time.perf_counter())
    stages = [f"{(end - begin) / depth * 1000:.0f}" for begin, end in itertools.pairwise(times)]
    return f"| {depth} | " + " | ".join(stages) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24])
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print("Time and memory of a step beside the same block's training in full precision: median (spread), memory")
    print("| network | block | full precision | fit | search for ranks |\n|---|---|---|---|---|")
    for name in NETWORKS:
        print(row(name, arguments), flush=True)
    print("\nMilliseconds a block\n| blocks | preparation and ranges | scores | fits of two steps |\n|--:|--:|--:|--:|")
    for depth in arguments.depths:
        print(by_depth(depth), flush=True)


if __name__ == "__main__":
    main()
