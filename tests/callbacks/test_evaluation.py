"""The evaluation counts every test sample once."""

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
