"""Train the embedded transformer on scikit-learn's digits and write the weights that are shipped with it.

The same torch on the same processor gives the same file: `python scripts/train_digits_vit.py`.
"""

from pathlib import Path

import torch
from digits_training import fit, run
from torch import Tensor

from pack_ptq.models import DigitsViT
from pack_ptq.models.digits_vit import WEIGHTS

EPOCHS = 120
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
POSITION_STD = 0.5


def train(images: Tensor, labels: Tensor, seed: int) -> DigitsViT:
    """Fit a network from random weights by AdamW.

    Args:
        images: `(samples, 1, 8, 8)`, standardised.
        labels: `(samples,)`, 0 to 9.
        seed: Decides the first weights, the order of the samples and the shifts.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    network = DigitsViT(pretrained=False)
    # Beside the patches timm's 0.02 is so small that many epochs pass before the network tells places apart.
    torch.nn.init.normal_(network.pos_embed, std=POSITION_STD)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    fit(network, optimizer, images, labels, EPOCHS, torch.Generator().manual_seed(seed))
    return network


def main() -> None:
    """Train and write, or measure on held-out images, as the command line says."""
    run(train, __doc__, Path(str(WEIGHTS)))


if __name__ == "__main__":
    main()
