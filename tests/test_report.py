"""Sizes and bits against counts by hand, and the table at the end of a run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pack_ptq import observe, plan_bits, prepare, set_ranges
from pack_ptq.graph.chain import Chain
from pack_ptq.report import bit_summary, peak_memory, render, size_summary, split_summary
from pack_ptq.types import BitPlan, QuantizerSpec, Recipe, Unit

# stem: 8 x 3 x 3 x 3 weights on 3 x 6 x 6 inputs; three blocks of two 8 x 8 x 3 x 3; head 5 x 8 on 8 inputs.
WEIGHTS = {"stem": 216, "block": 2 * 576, "head": 40}
INPUTS = {"stem": 108, "block": 2 * 288, "head": 8}


def test_size_by_hand(small_chain: Chain, small_plan: BitPlan) -> None:
    biases = 4 * (8 + 6 * 8 + 5)
    assert size_summary(small_chain, small_plan) == {
        "full_precision": 4 * (216 + 3 * 1152 + 40) + biases,
        # codes: 8 bits in stem and head, else 3; per output channel a float32 scale and a zero point of one byte;
        # per input a scale and a zero point
        "quantized": (216 + 40) + 6 * (576 * 3 // 8) + (8 + 6 * 8 + 5) * 5 + 8 * 5 + biases,
    }


def test_size_does_not_depend_on_hard_codes(small_chain: Chain, small_plan: BitPlan) -> None:
    before = size_summary(small_chain, small_plan)
    for layer in small_chain.layers.values():
        quantizer = layer.weight_quantizer
        quantizer.set_codes(quantizer.nearest_codes(layer.weight), quantizer.scale)
    assert size_summary(small_chain, small_plan) == before


class Sharing(nn.Module):
    """Two layers read one tensor; a norm stays; weights do not fill whole bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(3, 7, bias=False), nn.Linear(7, 3), nn.Linear(7, 3)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.norm(self.a(x) + self.b(x)))


@pytest.mark.parametrize(("profile", "zero_points"), [("paper", 16), ("deploy", 0)])
def test_size_of_shared_inputs_norms_and_odd_counts(profile: Any, zero_points: int) -> None:
    recipe = Recipe(QuantizerSpec(bits=3), QuantizerSpec(bits=3, per_channel=False), protocol="all", profile=profile)
    x = torch.randn(8, 3)
    chain = prepare(Sharing(), x).chain
    observe(chain, [x])
    plan = plan_bits([list(chain.layers)], [(3, 3)], recipe)
    set_ranges(chain, plan, recipe)
    rest = 4 * (3 + 3 + 3 + 3 + 3)  # three biases, the norm's weight and bias
    codes = 3 * 8 + 4  # 21 x 3 bits in 8 bytes, three times; 9 x 3 bits in 4 bytes
    inputs = 2 * 5  # of a and b together, of the head; the stem's image is not quantized
    assert size_summary(chain, plan) == {
        "full_precision": 4 * (21 * 3 + 9) + rest,
        "quantized": codes + 16 * 4 + zero_points + inputs + rest,
    }


def test_bit_averages_by_hand(small_chain: Chain, small_plan: BitPlan, small_units: list[Unit]) -> None:
    found = bit_summary(small_chain, small_units, small_plan)
    total = 216 + 3 * 1152 + 40
    assert found["weight_average"] == pytest.approx((8 * (216 + 40) + 3 * 3 * 1152) / total)
    assert found["activation_average"] == pytest.approx((8 * (108 + 8) + 3 * 6 * 288) / (108 + 6 * 288 + 8))
    assert [pack["blocks"] for pack in found["per_pack"]] == [list(unit.blocks) for unit in small_units]
    assert [pack["weight_average"] for pack in found["per_pack"]] == [8, 3, 3, 8]
    assert [pack["activation_average"] for pack in found["per_pack"]] == [8, 3, 3, 8]


def test_extra_codes_of_channels_count_as_columns_and_elements() -> None:
    torch.manual_seed(0)
    chain = prepare(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.randn(2, 4)).chain
    observe(chain, [torch.randn(8, 4)])
    recipe = Recipe(protocol="all")
    plan = plan_bits([list(chain.layers)], [(4, 4)], recipe)
    set_ranges(chain, plan, recipe)
    before = size_summary(chain, plan)["quantized"]
    chain.layers["2"].input_quantizer.copies = torch.tensor([[0, 0, 1, 0, 0, 0], [2.0, 0, 0, 0, 0, 0]])
    assert split_summary(chain) == {"2": 3}
    # three more columns of two weights at 4 bits, and for each which channel it is and its shift
    assert size_summary(chain, plan)["quantized"] == before + 3 + 3 * 8
    bits = bit_summary(chain, [Unit("pack", ("0", "2"), 0, len(chain))], plan)
    assert bits["weight_average"] == pytest.approx(4 * (24 + 18) / (24 + 12))
    assert bits["activation_average"] == pytest.approx((32 * 4 + 4 * 9) / (4 + 6))


def test_extra_codes_are_told_at_the_end() -> None:
    lines = render(report(split_channels={"blocks.7.mlp.fc2": 48}), "runs/x").splitlines()
    assert "extra codes for outlying channels: blocks.7.mlp.fc2 48" in lines


def test_peak_memory_grows_with_a_large_tensor() -> None:
    torch.ones(30 * 2**20)
    assert 120 * 2**20 < peak_memory() < 2**40


def report(**changes: Any) -> dict[str, Any]:
    metrics = {
        "full_precision": {"top1": 91.25, "top5": 99.5},
        "rounded_to_nearest": {"top1": 10.0, "top5": 40.0},
        "quantized": {"top1": 89.994, "top5": 99.0},
        "num_samples": 797,
    }
    return {
        "metrics": metrics,
        "bits": {"weight_average": 3.126, "activation_average": 3.5},
        "size_bytes": {"full_precision": 1_234_567, "quantized": 123_400},
        "seconds": {"calibration": 1.0, "scoring": 2.0, "reconstruction": {"total": 3.0}, "total": 6.5},
        "reconstruction": [
            {"name": "stem", "steps": 5, "accepted": True},
            {"name": "b.1", "steps": 5, "accepted": False},
        ],
        "protocol": "first_last_8",
        "profile": "paper",
        "seed": 4,
        "packs": [["stem"], ["b.0", "b.1"]],
        "peak_memory_bytes": 300 * 2**20,
        "left_out": [],
        **changes,
    }


def test_table() -> None:
    lines = render(report(), "runs/x").splitlines()
    assert lines[0].split() == ["top1", "top5", "weight", "bits", "activation", "bits", "size", "kB"]
    assert set(lines[1]) == {"-", " "}
    assert lines[2].split() == ["full", "precision", "91.25", "99.50", "32", "32", "1,234.6"]
    assert lines[3].split() == ["rounded", "to", "nearest", "10.00", "40.00", "3.13", "3.50", "123.4"]
    assert lines[4].split() == ["quantized", "89.99", "99.00", "3.13", "3.50", "123.4"]
    assert len({len(line) for line in lines[:5]}) == 1, "aligned"
    rest = "\n".join(lines[5:])
    for part in (
        "797 test samples",
        "hard integer weights",
        "first_last_8",
        "paper",
        "seed 4",
        "stem | b.0 b.1",
        "300 MiB",
    ):
        assert part in rest
    assert "kept rounded to nearest, for reconstruction ended worse: b.1" in rest
    assert "left in full precision" not in rest
    assert "tuning" not in rest
    assert "tensorboard --logdir runs/x" in rest


def test_table_tells_how_near_the_outputs_are() -> None:
    near = {"rounded_to_nearest": {"agreement": 12.5, "kl": 3.25}, "quantized": {"agreement": 97.25, "kl": 0.01234}}
    lines = render(report(fidelity=near), "runs/x").splitlines()
    assert lines[0].split()[2:5] == ["same", "class", "KL"]
    assert lines[2].split() == ["full", "precision", "91.25", "99.50", "32", "32", "1,234.6"], "nothing to compare with"
    assert lines[3].split()[3:7] == ["10.00", "40.00", "12.50", "3.2500"]
    assert lines[4].split()[1:5] == ["89.99", "99.00", "97.25", "0.0123"]
    del near["rounded_to_nearest"]  # measured by an older version
    lines = render(report(fidelity=near), "runs/x").splitlines()
    assert lines[3].split()[3:] == ["10.00", "40.00", "3.13", "3.50", "123.4"]
    assert len({len(line) for line in lines[:5]}) == 1, "aligned"


def test_table_names_layers_left_out() -> None:
    table = render(report(left_out=["aux.head"], reconstruction=[]), "runs/x")
    assert "left in full precision, for no call reaches them: aux.head" in table
    assert "ended worse" not in table


def test_table_tells_what_points_are_picked_by() -> None:
    def selection(call: str, module: str, full_precision: bool) -> dict[str, Any]:
        return {"call": call, "module": module, "full_precision": full_precision}

    dgcnn = [selection("knn", "edge1", True), *[selection("knn", f"edge{i}", False) for i in (2, 3)]]
    lines = render(report(selections=[*dgcnn, selection("argmax", "", True)]), "runs/x").splitlines()
    assert "picked by coordinates in full precision: knn in edge1 | argmax in ." in lines
    assert "picked by features of quantized layers: knn in edge2, edge3" in lines
    for without in (report(), report(selections=[])):
        assert "picked" not in render(without, "runs/x")


def test_table_tells_what_tuning_did() -> None:
    tuning = {"steps": 400, "before": 0.26, "after": 0.19, "accepted": True, "seconds": 7.0}
    seconds = report()["seconds"] | {"tuning": 7.0}
    table = render(report(tuning=tuning, seconds=seconds), "runs/x")
    assert "\ntuning: 400 steps, KL 0.26 -> 0.19 nats on held-out samples\n" in table
    assert "reconstruction 3.0, tuning 7.0, total 6.5" in table
    slower = render(report(tuning=tuning | {"rate_share": 0.123}, seconds=seconds), "")
    assert "\ntuning: 400 steps at 0.12 of the rates, KL 0.26 -> 0.19 nats" in slower
    assert "of the rates" not in render(report(tuning=tuning | {"rate_share": 1.0}, seconds=seconds), "")
    tuning |= {"after": 0.27}
    assert "KL 0.26 -> 0.27 nats on held-out samples, no worse beyond chance" in render(
        report(tuning=tuning, seconds=seconds), ""
    )
    tuning |= {"after": 0.26, "accepted": False}
    assert "KL 0.26 -> 0.26 nats on held-out samples, and nothing of it kept\n" in render(
        report(tuning=tuning, seconds=seconds), ""
    )
    assert "tuning" not in render(report(tuning=None, seconds=report()["seconds"] | {"tuning": 0.0}), "runs/x")


def test_units_without_a_fit_did_not_end_worse() -> None:
    units = [{"name": "stem", "steps": 0, "accepted": False}]
    assert "ended worse" not in render(report(reconstruction=units), "runs/x")
