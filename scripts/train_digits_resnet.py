"""Train the embedded network on scikit-learn's digits and write the weights that are shipped with it.

The same torch on the same processor gives the same file: `python scripts/train_digits_resnet.py`.
"""

from pathlib import Path

import torch
from digits_training import fit, run
from torch import Tensor

from pack_ptq.models import DigitsResNet
from pack_ptq.models.digits_resnet import WEIGHTS

EPOCHS = 60
LEARNING_RATE = 0.05
WEIGHT_DECAY = 5e-4


def train(images: Tensor, labels: Tensor, seed: int) -> DigitsResNet:
    """Fit a network from random weights by SGD with momentum.

    Args:
        images: `(samples, 1, 8, 8)`, standardised.
        labels: `(samples,)`, 0 to 9.
        seed: Decides the first weights, the order of the samples and the shifts.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    network = DigitsResNet(pretrained=False)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    fit(network, optimizer, images, labels, EPOCHS, torch.Generator().manual_seed(seed))
    return network


def main() -> None:
    """Train and write, or measure on held-out images, as the command line says."""
    run(train, __doc__, Path(str(WEIGHTS)))


if __name__ == "__main__":
    main()
