"""The embedded network: a residual network for scikit-learn's 8 x 8 digits, shipped with its weights."""

from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = files("pack_ptq.models") / "digits_resnet.safetensors"


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the form changes.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: 1, or 2 to halve height and width.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, channels, height / stride, width / stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class DigitsResNet(nn.Module):
    """A stem, three stages of two residual blocks with 8, 16 and 32 channels, and a linear head.

    With 44 thousand parameters it is just large enough for the digits, so that few bits cost it something to win back.
    `scripts/train_digits_resnet.py` makes the shipped weights.

    Args:
        pretrained: Load the shipped weights instead of random ones.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(ResidualBlock(8, 8, 1), ResidualBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResidualBlock(8, 16, 2), ResidualBlock(16, 16, 1))
        self.layer3 = nn.Sequential(ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.linear = nn.Linear(32, 10)
        if pretrained:
            with as_file(WEIGHTS) as file:
                self.load_state_dict(load_file(file))

    def forward(self, x: Tensor) -> Tensor:
        """Map standardised images `(batch, 1, 8, 8)` to scores `(batch, 10)`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
