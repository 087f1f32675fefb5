"""What tells whether two tensors, or two networks, are the same."""

import hashlib

import torch
from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> bytes:
    """Give the values as they lie in memory, whatever their type."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def network_digest(network: nn.Module) -> str:
    """Give a digest of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
