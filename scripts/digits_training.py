"""What the scripts that train the embedded networks on scikit-learn's digits share."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from pack_ptq.datamodules.digits import test_split, train_split

BATCH_SIZE = 64
LABEL_SMOOTHING = 0.1
HELD_OUT = 200


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image `(batch, 1, 8, 8)` by up to one pixel a side; the lowest value, the paper, moves in."""
    paper = images.min().item()
    padded = F.pad(images, (1, 1, 1, 1), value=paper)
    corners = torch.randint(3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, corners, strict=True)])


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    generator: torch.Generator,
) -> None:
    """Fit a network to shifted images, the optimizer's rate on one cosine after a warm-up; leave it in eval mode.

    Args:
        network: Maps `(batch, 1, 8, 8)` to `(batch, 10)`.
        optimizer: Of the network's parameters; its rate is the highest of the cycle.
        images: `(samples, 1, 8, 8)`, standardised.
        labels: `(samples,)`, 0 to 9.
        epochs: Passes over the images.
        generator: Decides the order of the samples and the shifts.
    """
    # A partial last batch could hold a single image, too few for BatchNorm.
    steps = len(images) // BATCH_SIZE
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.1)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE].split(BATCH_SIZE):
            scores = network(shifted(images[batch], generator))
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Give the share of right answers in percent."""
    return 100 * (network(images).argmax(1) == labels).double().mean().item()


def write(network: nn.Module, file: Path) -> None:
    """Write the weights in one go, so that no half-written file is ever in place."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(save(network.state_dict()))
    os.replace(partial, file)


def run(train: Callable[[Tensor, Tensor, int], nn.Module], description: str | None, output: Path) -> None:
    """Train, print the accuracies, write the weights; or only measure settings on held-out training images.

    Args:
        train: Maps images `(samples, 1, 8, 8)`, labels `(samples,)` and a seed to a network in eval mode.
        description: Help text of the command line.
        output: Where the weights go if the command line names no file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold_out", action="store_true", help="measure on held-out training images, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, would differ with the number of threads
    images, labels = train_split()
    if arguments.hold_out:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed))
        held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
        network = train(images[kept], labels[kept], arguments.seed)
        print(f"held-out accuracy: {accuracy(network, images[held_out], labels[held_out]):.2f} %")
        return
    network = train(images, labels, arguments.seed)
    print(f"train accuracy: {accuracy(network, images, labels):.2f} %")
    print(f"test accuracy: {accuracy(network, *test_split()):.2f} %")
    write(network, arguments.output)
