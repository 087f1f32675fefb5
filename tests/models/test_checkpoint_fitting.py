import pytest
import torch
from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.models import CifarResNet
from pack_ptq.models.fitting import fit_state_dict


@pytest.fixture
def state():
    torch.manual_seed(1)
    return CifarResNet(depth=8).state_dict()


def fitted(state, network=None):
    network = network or CifarResNet(depth=8)
    fit_state_dict(network, state, "a.pth")
    return network.state_dict()


def message(state):
    with pytest.raises(UserError) as refusal:
        fitted(state)
    assert "model.checkpoint is 'a.pth'" in str(refusal.value)
    assert "does not fit" in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "net.", "backbone.", "module._orig_mod.model."]
)
def test_shared_prefixes_are_removed(state, prefix):
    loaded = fitted({prefix + key: value for key, value in state.items()})
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_prefix_that_belongs_to_the_network_stays():
    network = nn.ModuleDict({"model": nn.ModuleDict({"model": nn.Linear(2, 2)})})
    state = {f"module.model.model.{key}": torch.ones_like(v) for key, v in nn.Linear(2, 2).state_dict().items()}
    assert torch.equal(fitted(state, network)["model.model.weight"], torch.ones(2, 2))


def test_half_precision_weights_become_float32(state):
    loaded = fitted({key: v.half() if v.is_floating_point() else v for key, v in state.items()})
    assert loaded["conv1.weight"].dtype == torch.float32
    assert torch.equal(loaded["conv1.weight"], state["conv1.weight"].half().float())


def test_num_batches_tracked_may_be_missing(state):
    loaded = fitted({key: value for key, value in state.items() if "num_batches_tracked" not in key})
    assert torch.equal(loaded["linear.weight"], state["linear.weight"])


def test_missing_keys_are_refused(state):
    for key in ["conv1.weight", "bn1.bias", "linear.weight", "linear.bias"]:
        del state[key]
    assert "4 missing (conv1.weight, bn1.bias, linear.weight, ...)" in message(state)


def test_unexpected_keys_are_refused(state):
    state["head.weight"] = torch.zeros(2)
    text = message(state)
    assert "1 unexpected (head.weight)" in text
    assert "missing" not in text


def test_different_shapes_are_refused(state):
    state["linear.weight"] = torch.zeros(100, 64)
    state["linear.bias"] = torch.zeros(100)
    text = message(state)
    assert "2 different (linear.weight (100, 64) instead of (10, 64), linear.bias (100,) instead of (10,))" in text
    assert "missing" not in text


def test_integer_codes_are_refused(state):
    state["conv1.weight"] = torch.zeros(16, 3, 3, 3, dtype=torch.int8)
    assert "conv1.weight torch.int8 instead of torch.float32" in message(state)


def test_weights_of_another_network_are_refused():
    text = message(CifarResNet(depth=14).state_dict())
    assert "unexpected (layer1.1.conv1.weight" in text


def test_wholly_foreign_weights_are_refused():
    text = message(nn.Linear(2, 2).state_dict())
    assert "missing" in text
    assert "2 unexpected (weight, bias)" in text
