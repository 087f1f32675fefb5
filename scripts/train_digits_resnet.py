"""Train the embedded network on scikit-learn's digits and write the weights that are shipped with it.

The same torch on the same processor gives the same file: `python scripts/train_digits_resnet.py`.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from pack_ptq.datamodules.digits import test_split, train_split
from pack_ptq.models import DigitsResNet
from pack_ptq.models.digits_resnet import WEIGHTS

EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 0.05
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
HELD_OUT = 200


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image `(batch, 1, 8, 8)` by up to one pixel a side; the lowest value, the paper, moves in."""
    paper = images.min().item()
    padded = F.pad(images, (1, 1, 1, 1), value=paper)
    corners = torch.randint(3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, corners, strict=True)])


def train(images: Tensor, labels: Tensor, seed: int) -> DigitsResNet:
    """Fit a network from random weights by SGD with momentum, its rate on one cosine after a warm-up.

    Args:
        images: `(samples, 1, 8, 8)`, standardised.
        labels: `(samples,)`, 0 to 9.
        seed: Decides the first weights, the order of the samples and the shifts.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsResNet(pretrained=False)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    # A partial last batch could hold a single image, too few for BatchNorm.
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE].split(BATCH_SIZE):
            scores = network(shifted(images[batch], generator))
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: DigitsResNet, images: Tensor, labels: Tensor) -> float:
    """Give the share of right answers in percent."""
    return 100 * (network(images).argmax(1) == labels).double().mean().item()


def write(network: DigitsResNet, file: Path) -> None:
    """Write the weights in one go, so that no half-written file is ever in place."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(save(network.state_dict()))
    os.replace(partial, file)


def main() -> None:
    """Train, print the accuracies, write the weights; or only measure settings on held-out training images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(str(WEIGHTS)))
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


if __name__ == "__main__":
    main()
