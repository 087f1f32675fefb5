"""Cost of Hessian scoring in full forwards, beside the plain way (3N + 1 forwards and N backwards), in one run.

python benchmarks/scoring_cost.py [--batches 4] [--batch-size 32] [--repeats 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch

from pack_ptq import inner_links, observe, plan_bits, prepare, set_ranges
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized
from pack_ptq.hessian import HessianScorer
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.models import CifarResNet
from pack_ptq.types import QuantizerSpec, Recipe

NETWORKS = {
    "cifar_resnet20": (lambda: CifarResNet(20), 32),
    "resnet18": (lambda: timm.create_model("resnet18"), 96),
    "mobilenetv2_100": (lambda: timm.create_model("mobilenetv2_100"), 96),
}


def plain_scores(chain: Chain, x: torch.Tensor, start: int, stop: int) -> None:
    """Do for each block what the authors' release does: whole forwards, and a backward to the block."""
    with torch.no_grad():
        reference = chain.network(x)
    for link in range(start, stop):
        layers = list(chain.layers_of(link, link + 1).values())
        with torch.no_grad():
            chain.run_collecting(x, 0, len(chain), [link + 1])
            with quantized(layers, "nearest"):
                chain.run_collecting(x, 0, len(chain), [link + 1])
        inputs = x.clone().requires_grad_(True)
        found = chain.run_collecting(inputs, 0, len(chain), [link + 1])
        loss = kl_from_full_precision(found[len(chain)], reference).sum()
        torch.autograd.grad(loss, found[link + 1])


def seconds(function: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for name, (build, size) in NETWORKS.items():
        torch.manual_seed(0)
        x = torch.randn(arguments.batch_size, 3, size, size)
        chain = prepare(build(), x).chain
        recipe = Recipe(QuantizerSpec(bits=4), QuantizerSpec(bits=4, per_channel=False))
        observe(chain, [x])
        set_ranges(chain, plan_bits([list(chain.layers)], [(4, 4)], recipe), recipe)
        start, stop = inner_links(chain)
        ours, plain = [], []
        for _ in range(arguments.repeats):
            with torch.no_grad():
                forward = statistics.median(seconds(chain.network, x) for _ in range(5))
            ours.append(seconds(HessianScorer(chain, start, stop).update, x) / forward)
            plain.append(seconds(plain_scores, chain, x, start, stop) / forward)
        blocks, limit = stop - start, (stop - start) / 2 + 2
        print(
            f"{name}: {blocks} blocks, scoring {statistics.median(ours):.2f} forwards "
            f"(spread {min(ours):.2f} to {max(ours):.2f}, limit N/2 + 2 = {limit:.1f}), "
            f"plain {statistics.median(plain):.2f} (spread {min(plain):.2f} to {max(plain):.2f})"
        )


if __name__ == "__main__":
    main()
