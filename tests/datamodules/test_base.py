"""The base class: exact sharding, the checks before work, what the network's output must be."""

import pytest
import torch
from torch import nn

from pack_ptq.datamodules import TensorData
from pack_ptq.errors import UserError


def numbered(count: int, batch_size: int = 8) -> TensorData:
    inputs = torch.arange(count, dtype=torch.float32)[:, None]
    labels = torch.arange(count) % 3
    return TensorData((inputs, labels), (inputs, labels), batch_size=batch_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_shards_cover_each_sample_exactly_once(world_size: int, loader: str) -> None:
    data, seen = numbered(101), []
    for rank in range(world_size):
        data.shard(rank, world_size)
        seen += [int(number) for batch, _ in getattr(data, loader)() for number in batch]
    assert sorted(seen) == list(range(101))


def test_one_process_reads_in_order_with_the_partial_batch() -> None:
    batches = [batch for batch, _ in numbered(101).val_dataloader()]
    assert [len(batch) for batch in batches] == [8] * 12 + [5]
    assert torch.cat(batches).flatten().tolist() == list(range(101))


def test_fewer_samples_than_a_batch_are_refused_with_both_numbers() -> None:
    data = numbered(10, batch_size=64)
    with pytest.raises(UserError, match=r"data\.init_args\.batch_size is 64; allowed: 1 to 10, .*data\.calibration"):
        data.check()
    numbered(10, batch_size=10).check()


@pytest.mark.parametrize(
    ("key", "value", "allowed"), [("batch_size", 0, "1 or more"), ("num_workers", -1, "0 or more")]
)
def test_loader_settings_out_of_range_are_refused(key: str, value: int, allowed: str) -> None:
    inputs = torch.zeros(4, 2)
    with pytest.raises(UserError, match=rf"data\.init_args\.{key} is {value}; allowed: {allowed}"):
        TensorData(inputs, (inputs, torch.zeros(4, dtype=torch.long)), **{key: value})


def test_task_loss_is_one_cross_entropy_per_sample() -> None:
    scores, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = numbered(6).task_loss(scores, labels)
    expected = -torch.log_softmax(scores, 1)[torch.arange(6), labels]
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4), [torch.zeros(2, 3)], nn.Identity()])
def test_outputs_that_are_not_scores_are_refused(output: object) -> None:
    with pytest.raises(UserError, match=r"output is .*allowed for classification: one tensor \(batch, classes\)"):
        numbered(6).check_output(output)
