"""Train the embedded networks for point clouds on the solids and write the weights that are shipped with them.

The same torch on the same processor gives the same files: `python scripts/train_solids.py`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_training import write
from torch import Tensor, nn

from pack_ptq.datamodules import SolidsData
from pack_ptq.datamodules.part_iou import PartIoU
from pack_ptq.datamodules.point_augmentation import PointAugmentation
from pack_ptq.datamodules.solids import PARTS, TRAIN_SIZE
from pack_ptq.models import SolidsPartNet, SolidsPointNet
from pack_ptq.models.points.solids_pointnet import PARTNET_WEIGHTS, POINTNET_WEIGHTS

BATCH_SIZE = 32
HELD_OUT = 400
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
# Few points make an epoch cheap; the last epochs see more, for a maximum over more points is larger.
STAGES = {"classification": ((40, 128), (4, 512)), "parts": ((16, 128), (2, 512))}  # (epochs, points)
NETWORKS = {"classification": SolidsPointNet, "parts": SolidsPartNet}
WEIGHTS = {"classification": POINTNET_WEIGHTS, "parts": PARTNET_WEIGHTS}
AUGMENTATION = PointAugmentation(rotation=180.0, scale=0.2, jitter=0.02)


@dataclass(frozen=True)
class Samples:
    """Solids with what is to be told of them.

    Attributes:
        inputs: `(samples, 1024, 3)`, for parts `(samples, 1024, 3 + 20)`.
        labels: `(samples,)`, for parts `(samples, 1024)`.
    """

    inputs: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Samples":
        """Give some of the samples."""
        return Samples(self.inputs[index], self.labels[index])

    def view(self, points: int, generator: torch.Generator) -> "Samples":
        """Draw points, the same places in all clouds, whose own order is random, and turn, scale and jitter them."""
        drawn = torch.randperm(self.inputs.shape[1], generator=generator)[:points]
        labels = self.labels if self.labels.ndim == 1 else self.labels[:, drawn]
        return Samples(AUGMENTATION.change(self.inputs[:, drawn], "y", generator), labels)


def splits(task: str) -> tuple[Samples, Samples]:
    """Give the training clouds, in an order of the seed 0, and the test clouds."""
    data = SolidsData(task, num_calibration=TRAIN_SIZE)
    both = []
    for dataset in (data.calibration_dataset(), data.test_dataset()):
        inputs, labels = zip(*dataset, strict=True)
        labels = torch.tensor(labels) if task == "classification" else torch.stack(labels)
        both.append(Samples(torch.stack(inputs), labels))
    return both[0], both[1]


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    """Give the mean cross-entropy of clouds `(batch, classes)` or of their points `(batch, points, parts)`."""
    return F.cross_entropy(output.flatten(0, -2), labels.flatten(), label_smoothing=LABEL_SMOOTHING)


def train(task: str, samples: Samples, seed: int) -> nn.Module:
    """Fit a network from random weights by AdamW, its rate on one cosine after a warm-up.

    Args:
        task: `classification` or `parts`.
        samples: To learn from.
        seed: Decides the first weights, the order of the samples, the points and the views.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = NETWORKS[task](pretrained=False)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = len(samples.inputs) // BATCH_SIZE
    total = steps * sum(epochs for epochs, _ in STAGES[task])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=0.1)
    network.train()
    for points in (points for epochs, points in STAGES[task] for _ in range(epochs)):
        order = torch.randperm(len(samples.inputs), generator=generator)[: steps * BATCH_SIZE]
        for batch in order.split(BATCH_SIZE):
            view = samples[batch].view(points, generator)
            optimizer.zero_grad()
            loss_of(network(view.inputs), view.labels).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def score(task: str, network: nn.Module, samples: Samples) -> float:
    """Give the overall accuracy or, for parts, the instance mIoU, in percent."""
    output = torch.cat([network(inputs) for inputs in samples.inputs.split(100)])
    if task == "classification":
        return 100 * (output.argmax(1) == samples.labels).double().mean().item()
    metric = PartIoU(list(PARTS.values()), "instance")
    metric.update(output, samples.labels)
    return 100 * metric.compute().item()


def run(task: str, output: Path, seed: int, hold_out: bool) -> None:
    """Train one network, print its scores and write it; or only score settings on held-out training clouds."""
    known, test = splits(task)
    if hold_out:
        network = train(task, known[HELD_OUT:], seed)
        print(f"{task}: held-out {score(task, network, known[:HELD_OUT]):.2f} %", flush=True)
        return
    network = train(task, known, seed)
    print(f"{task}: train {score(task, network, known):.2f} %, test {score(task, network, test):.2f} %", flush=True)
    write(network, output)


def main() -> None:
    """Train and write, or measure on held-out clouds, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output_dir", type=Path, default=Path(str(POINTNET_WEIGHTS)).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold_out", action="store_true", help="measure on held-out training clouds, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, would differ with the number of threads
    for task in arguments.tasks:
        output = arguments.output_dir / Path(str(WEIGHTS[task])).name
        run(task, output, arguments.seed, arguments.hold_out)


if __name__ == "__main__":
    main()
