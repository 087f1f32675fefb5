"""Random weights and images under which a network's logits differ from image to image.

As libraries initialise them, many networks give nearly constant logits: heads and residual gains start at zero, layer
scales at 1e-6, BatchNorm statistics at 0 and 1. A comparison of such logits would say nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 0.1
OCTAVES = {4: 0.8, 8: 0.7, 16: 0.6, 32: 0.5, 64: 0.4}  # amplitudes by points on a side


def generated_images(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Give noise whose amplitude falls with its frequency, as in photographs; each image has mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    channels, *size = shape
    images = 0.4 * torch.randn(count, *shape, generator=generator)
    for points, gain in OCTAVES.items():
        grid = gain * torch.randn(count, channels, points, points, generator=generator)
        images += F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
    images -= images.mean((1, 2, 3), keepdim=True)
    return images / images.std((1, 2, 3), keepdim=True)


def generated_noise(images: Tensor) -> Tensor:
    """Give white noise of deviation 1 in the form of some images."""
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def randomise(network: nn.Module, images: Tensor, seed: int) -> None:
    """Move the initial values to where a trained network's might be; in place.

    - Norms: weights uniform in [0.75, 1.25], biases normal with deviation 0.1.
    - Weights of two or more axes that are constant, or whose deviation is below half of 1/sqrt(fan-in): normal with,
      or scaled to, the deviation 1/sqrt(fan-in).
    - Other constants below 0.1: biases, tokens and tables at zero become normal with deviation 0.02, gains and layer
      scales uniform in [0.1, 0.5].
    - BatchNorm statistics: mean 0 and the mean square of `images` at that place. With the mean taken off, a deep
      network of random weights is chaotic: what differs between two inputs grows from norm to norm.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _move(module, name, parameter, generator)
    network.eval()
    norms = [m for m in network.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    handles = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
    if norms:
        network(images)
    for handle in handles:
        handle.remove()


def _set_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    norm.running_mean.zero_()
    norm.running_var.copy_(args[0].transpose(0, 1).flatten(1).double().square().mean(1))


def _move(module: nn.Module, name: str, x: Tensor, generator: torch.Generator) -> None:
    if x.numel() == 0 or not x.is_floating_point():
        return
    constant = bool(x.min() == x.max())
    small = abs(x.flatten()[0].item()) < SMALL
    if "norm" in type(module).__name__.lower() and x.ndim <= 1:
        if name.endswith("bias"):
            x.normal_(0, 0.1, generator=generator)
        else:
            x.uniform_(0.75, 1.25, generator=generator)
    elif x.ndim >= 2 and name.endswith("weight") and not isinstance(module, nn.Embedding):
        wanted = (x.numel() / x.shape[0]) ** -0.5
        if constant and small:
            x.normal_(0, wanted, generator=generator)
        elif not constant and x.std() < wanted / 2:
            x.mul_(wanted / x.std())
    elif constant and small:
        if name.endswith("bias") or (x.ndim > 1 and not x.any()):
            x.normal_(0, 0.02, generator=generator)
        else:
            x.uniform_(0.1, 0.5, generator=generator)
