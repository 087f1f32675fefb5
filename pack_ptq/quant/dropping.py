"""QDrop's random choice of elements (arXiv 2203.05740, eq. 12)."""

import torch
from torch import Tensor


def random_mask(like: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a mask of zeros and ones.

    One random byte an element: QDrop draws a mask for every quantizer in every step, and `torch.rand` would cost more
    than the convolutions between them.

    Args:
        like: Gives shape, memory layout, device and type of the mask.
        share: Of the ones, in [0, 1]; rounded to a multiple of 1/256.
        generator: Source of the choice, on the device of `like`.

    Returns:
        Zeros and ones in the shape of `like`.
    """
    below = round(share * 256)
    if below > 255:
        return torch.ones_like(like)
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    layout = torch.empty_like(like, device="meta").stride()
    draws = words.view(torch.uint8).as_strided(like.shape, layout)
    return draws.lt(below).to(like.dtype)
