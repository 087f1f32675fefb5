"""GPTQ's start: what weights multiply against the layers themselves, roundings against the update written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pack_ptq.quant.gptq import DAMPING, gptq_start, multiplied

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear over tokens": (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 2, 5, 5)),
    "grouped": (nn.Conv2d(6, 4, (3, 2), groups=2), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_weights_times_what_they_multiply_are_the_output(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x = random(*shape)
    rows = multiplied(layer, x)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.reshape(groups, -1, rows.shape[2])
    output = (rows @ weight.mT).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        output = output + layer.bias
    wanted = layer(x)
    channels = wanted.movedim(1, -1) if isinstance(layer, nn.modules.conv._ConvNd) else wanted
    torch.testing.assert_close(output, channels.reshape(-1, channels.shape[-1]), rtol=1e-5, atol=1e-5)


def gram_of(rows: Tensor) -> Tensor:
    return (rows.double().mT @ rows.double() / rows.shape[1]).contiguous()


def written_out(weight: Tensor, gram: Tensor, limits: tuple[int, int]) -> Tensor:
    """Round one row as the paper's equations 1 and 2 say, with a new inverse for what is left after every column."""
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left, codes = weight.double().clone(), torch.empty(len(weight), dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True).tolist()
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = gram[rest][:, rest].inverse()
        codes[column] = left[column].round().clamp(*limits)
        left[rest] -= (left[column] - codes[column]) / inverse[0, 0] * inverse[0]
    return codes


@given(st.integers(0, 1000), st.integers(2, 12), st.sampled_from([(0, 7), (-4, 3), (0, 255)]))
def test_codes_are_those_of_the_update_written_out(seed: int, columns: int, limits: tuple[int, int]) -> None:
    mixing = random(columns, columns, seed=seed)
    gram = gram_of((random(50, columns, seed=seed + 1) @ mixing)[None])
    span = limits[1] - limits[0]
    weight = (limits[0] + span * (0.5 + random(1, 3, columns, seed=seed + 2) / 4)).double()
    start = gptq_start(weight, gram, limits)
    assert start is not None
    assert torch.equal(start[0].round(), torch.stack([written_out(row, gram[0], limits) for row in weight[0]]))
    assert (start.round() >= limits[0]).all()
    assert (start.round() <= limits[1]).all()


def error(weight: Tensor, codes: Tensor, gram: Tensor) -> float:
    off = (weight - codes).double()
    return (off @ gram * off).sum().item()


@pytest.mark.parametrize("columns", [9, 300])
def test_output_errors_fall(columns: int) -> None:
    groups, low = 2, random(1, 400, columns, seed=1)
    gram = gram_of(low @ random(groups, columns, columns, seed=2))
    weight = 8 + 2 * random(groups, 5, columns, seed=3)
    start = gptq_start(weight, gram, (0, 15))
    assert start is not None
    assert error(weight, start.round(), gram) < 0.6 * error(weight, weight.round().clamp(0, 15), gram)


def test_inputs_that_have_nothing_in_common_round_to_nearest() -> None:
    weight = 4 + random(1, 3, 6)
    start = gptq_start(weight, torch.diag(torch.arange(1.0, 7).double())[None], (0, 7))
    assert start is not None
    torch.testing.assert_close(start, weight, rtol=0, atol=2e-3)


def test_groups_do_not_mix() -> None:
    gram = gram_of(random(3, 40, 8, seed=1) @ random(3, 8, 8, seed=2))
    weight = 4 + random(3, 2, 8, seed=3)
    together = gptq_start(weight, gram, (0, 7))
    alone = [gptq_start(weight[i : i + 1], gram[i : i + 1], (0, 7)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))  # type: ignore[arg-type]


def test_unused_and_unusable_inputs() -> None:
    weight = 4 + random(1, 2, 3)
    start = gptq_start(weight, torch.zeros(1, 3, 3, dtype=torch.float64), (0, 7))
    assert start is not None
    torch.testing.assert_close(start.round(), weight.round())
    assert gptq_start(weight, torch.full((1, 3, 3), torch.nan, dtype=torch.float64), (0, 7)) is None
