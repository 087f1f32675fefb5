"""Which layers share the quantizer of their input."""

import torch
from torch import Tensor, nn

from pack_ptq.graph.prepare import prepare


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside = nn.Linear(4, 4), nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x) + self.beside(x))
        return self.last(torch.relu(self.left(x) + self.right(x)))


def test_readers_of_one_tensor_share_their_quantizer_but_the_first_layer_has_its_own() -> None:
    layers = prepare(TwoReaders(), torch.randn(2, 4)).chain.layers
    assert layers["left"].input_quantizer is layers["right"].input_quantizer
    assert layers["first"].input_quantizer is not layers["beside"].input_quantizer
    assert len({id(layer.input_quantizer) for layer in layers.values()}) == 4
