"""What runs share of their measurements: only that of the very same network, mode and conditions."""

import copy
from pathlib import Path

import pytest
import torch
from e2e_helpers import TinyNet
from plan_helpers import plan_for

from pack_ptq import Recipe, observe, prepare, set_ranges
from pack_ptq.graph.chain import Chain
from pack_ptq.measurements import Measurements
from pack_ptq.types import QuantizerSpec


@pytest.fixture(scope="module")
def ready() -> Chain:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    chain = prepare(TinyNet(), x[:2]).chain
    observe(chain, [x])
    recipe = Recipe(QuantizerSpec(4), QuantizerSpec(4, per_channel=False))
    set_ranges(chain, plan_for(chain, recipe), recipe)
    return chain


def shared(tmp_path: Path, *conditions: str) -> Measurements:
    return Measurements(tmp_path / "shared", conditions)


def test_an_equal_network_has_the_same_file(ready, tmp_path) -> None:
    there = shared(tmp_path, "samples")
    assert there.file(copy.deepcopy(ready), "nearest") == there.file(ready, "nearest")


def quantizer(chain: Chain) -> QuantizerSpec:
    return list(chain.layers.values())[2].input_quantizer


CHANGES = {
    "a weight": lambda chain: next(iter(chain.layers.values())).weight.data[0, 0, 0].add_(1e-6),
    "a norm's or other parameter": lambda chain: chain.network.head.layer.bias.data[3:4].neg_(),
    "a scale": lambda chain: quantizer(chain).scale.data.mul_(1.001),
    "bits": lambda chain: setattr(quantizer(chain), "bits", 5),
    "a kind of codes": lambda chain: setattr(quantizer(chain), "kind", "focusing"),
    "not quantized at all": lambda chain: setattr(quantizer(chain), "bits", None),
    "how the bias is rounded": lambda chain: setattr(chain.layers["stem"], "integer_bias", True),
    "noise": lambda chain: setattr(chain.layers["stem"], "noise", torch.zeros(3)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_network_has_another_file(what, ready, tmp_path) -> None:
    other = copy.deepcopy(ready)
    CHANGES[what](other)
    there = shared(tmp_path, "samples")
    assert there.file(other, "nearest") != there.file(ready, "nearest")


def test_another_mode_or_condition_is_another_file(ready, tmp_path) -> None:
    files = {shared(tmp_path, "a", "b").file(ready, mode) for mode in ("off", "nearest", "hard")}
    files |= {shared(tmp_path, *of).file(ready, "off") for of in (("a",), ("ab",), ("b", "a"), ("a", "b"))}
    assert len(files) == 6


def test_what_is_written_is_read_and_nothing_else(tmp_path) -> None:
    there = shared(tmp_path)
    file = there.folder / "digest.json"
    assert there.read(file) is None
    there.write(file, {"metrics": {"top1": 99.0}, "num_samples": 500})
    assert there.read(file) == {"metrics": {"top1": 99.0}, "num_samples": 500}
    assert [path.name for path in there.folder.iterdir()] == ["digest.json"]
