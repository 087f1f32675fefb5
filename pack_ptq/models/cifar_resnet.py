"""The residual network for 32 x 32 images of He et al. 2015, section 4.2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.errors import refuse
from pack_ptq.types import Preprocessing


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters (option A).

    Where the block halves the image, the shortcut takes every second pixel and pads new channels with zeros,
    half of them on each side.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: 1, or 2 to halve height and width.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (channels - in_channels) // 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, channels, height / stride, width / stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, -56, -110 for CIFAR: a stem, three stages of (depth - 2) / 6 blocks, a linear head.

    Args:
        depth: Number of layers with weights, 6 n + 2 with n of 1 or more.
        num_classes: Outputs of the head.

    Raises:
        UserError: `depth` is not 6 n + 2.
    """

    preprocessing = Preprocessing(
        image_size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_ratio=1.0
    )

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise refuse("model.init_args.depth", depth, "6 n + 2: 8, 14, 20, 26, 32, ...")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, 3, 32, 32)` to scores `(batch, num_classes)`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)
