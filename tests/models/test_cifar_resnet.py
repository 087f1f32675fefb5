import pytest
import torch
from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.models import CifarResNet
from pack_ptq.models.cifar_resnet import BasicBlock


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_parameters_as_in_the_paper(depth, parameters):
    network = CifarResNet(depth)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_number_of_classes():
    assert CifarResNet(8, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_shortcut_takes_every_second_pixel_and_pads_both_sides():
    block = BasicBlock(16, 32, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 8, 8)
    expected = torch.zeros(1, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(UserError, match=rf"model.init_args.depth is {depth}; allowed: 6 n \+ 2"):
        CifarResNet(depth)
