"""Cost of a reconstruction step through Lightning beside the bare loop, on ResNet-20's packs, in one run.

python benchmarks/step_overhead.py [--steps 100] [--repeats 5]
"""

import argparse
import statistics
import time

import torch

from pack_ptq import fixed_packs, inner_links, observe, plan_bits, prepare, set_ranges, tile_units
from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.callbacks import KeepBest, ReconstructionMonitor, RunProgress
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import unit_part
from pack_ptq.graph.switch import switch
from pack_ptq.models import CifarResNet
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.random_batches import RandomBatches
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Hardware, QuantizerSpec, Recipe, ReconstructionSpec, Unit

SAMPLES = 256


def bare(module: PackReconstruction, batches) -> None:
    module.begin(torch.device("cpu"))
    chosen = module.configure_optimizers()
    optimizer, scheduler = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    for index, batch in enumerate(batches):
        loss = module.training_step(batch, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def seconds(chain: Chain, unit: Unit, data: PackData, recipe: Recipe, through_lightning: bool) -> float:
    spec, steps = recipe.reconstruction, recipe.steps
    module = PackReconstruction(unit_part(chain, unit, unit.name), spec, steps, seed=0)
    batches = RandomBatches(data, spec.batch_size, steps, seed=0).loader()
    began = time.perf_counter()
    if through_lightning:
        callbacks = [KeepBest(data, set()), ReconstructionMonitor(), RunProgress([unit], steps, enabled=False)]
        make_trainer(Hardware("cpu"), callbacks, max_steps=steps).fit(module, batches)
    else:
        bare(module, batches)
    passed = time.perf_counter() - began
    module.end()
    switch(chain.operations, "off", activations=False)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 3, 32, 32)
    chain = prepare(CifarResNet(20), x).chain
    bits = QuantizerSpec(bits=3), QuantizerSpec(bits=3, per_channel=False)
    recipe = Recipe(*bits, reconstruction=ReconstructionSpec(steps=arguments.steps))
    observe(chain, [x])
    set_ranges(chain, plan_bits([list(chain.layers)], [(3, 3)], recipe), recipe)
    start, stop = inner_links(chain)
    budget = MemoryBudget(2**32)
    for unit in tile_units(chain, fixed_packs(stop - start, 2)):
        with torch.no_grad():
            value = chain.run(x, 0, unit.start)
        source = fill(budget, SAMPLES, [value], lambda v: v)
        target = fill(budget, SAMPLES, [value], lambda v: chain.run(v, unit.start, unit.stop))  # noqa: B023
        data = PackData(source, source, target)
        pairs = [[seconds(chain, unit, data, recipe, way) for way in (False, True)] for _ in range(arguments.repeats)]
        ratios = [lightning / plain for plain, lightning in pairs]
        step = statistics.median(plain for plain, _ in pairs) / arguments.steps * 1000
        print(
            f"{unit.name}: bare loop {step:.2f} ms a step; through Lightning x {statistics.median(ratios):.3f} "
            f"(spread {min(ratios):.3f} to {max(ratios):.3f}, limit 1.15)"
        )


if __name__ == "__main__":
    main()
