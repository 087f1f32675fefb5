"""The evaluation counts every test sample once."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pack_ptq import Hardware, prepare
from pack_ptq.callbacks import Evaluation
from pack_ptq.datamodules import TensorData
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.trainers import make_trainer


@pytest.mark.parametrize("batch_size", [7, 24, 61])
def test_accuracy_by_hand(small_network: nn.Module, samples: Tensor, batch_size: int) -> None:
    samples, labels = samples[:61], torch.arange(61) % 5
    chain = prepare(small_network, samples[:4]).chain
    evaluation = Evaluation()
    data = TensorData(samples, (samples, labels), batch_size=batch_size, num_classes=5)
    for _ in range(2):  # the second time from the start
        make_trainer(Hardware("cpu"), [evaluation]).test(WholeNetwork(chain), data, verbose=False)
        with torch.no_grad():
            right = int((chain.network(samples).argmax(1) == labels).sum())
        assert evaluation.num_samples == 61
        assert evaluation.values == {"top1": pytest.approx(100 * right / 61)}
        assert evaluation.fidelity == {}


def test_nearness_to_full_precision_by_hand(small_network: nn.Module, samples: Tensor) -> None:
    samples, labels = samples[:61], torch.arange(61) % 5
    chain = prepare(small_network, samples[:4]).chain
    evaluation, reference = Evaluation(), copy.deepcopy(chain.network)
    data = TensorData(samples, (samples, labels), batch_size=24, num_classes=5)

    def test(reference: nn.Module | None) -> None:
        module = WholeNetwork(chain, reference=reference)
        make_trainer(Hardware("cpu"), [evaluation]).test(module, data, verbose=False)

    test(reference)
    assert evaluation.fidelity == {"agreement": 100, "kl": 0}
    with torch.no_grad():
        for parameter in chain.network.parameters():
            parameter.mul_(0.6)
        p, q = (network(samples).double().softmax(1) for network in (reference, chain.network))
    test(reference)
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True))
    divergence = sum(float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)) / 61
    assert evaluation.fidelity == {
        "agreement": pytest.approx(100 * same / 61),
        "kl": pytest.approx(divergence, rel=1e-4),
    }
    assert divergence > 1e-4
    test(None)
    assert evaluation.fidelity == {}
