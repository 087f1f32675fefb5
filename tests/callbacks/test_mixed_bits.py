"""Mixed bits in a run: measured on the packs, within the budget, told in the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import pack_ptq
from pack_ptq import Hardware, QuantizerSpec, Recipe, ReconstructionSpec, TuningSpec, UserError, measure_sensitivity
from pack_ptq.callbacks import MixedBits, NoPacking, UniformBits, WholePacking
from pack_ptq.datamodules import DigitsData, TensorData
from pack_ptq.graph.chain import Chain
from pack_ptq.models import DigitsResNet
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.pipeline import Plan
from pack_ptq.quant.quantizers import WeightQuantizer
from pack_ptq.report import render
from pack_ptq.trainers import make_trainer
from pack_ptq.types import Unit

LABELS = torch.arange(64) % 5


def data_of(samples: Tensor) -> TensorData:
    return TensorData(samples, (samples, LABELS), batch_size=24, num_classes=5)


def validate(chain: Chain, samples: Tensor, bits: MixedBits, units: list[Unit], recipe: Recipe) -> None:
    bits.recipe, bits.units = recipe, units
    trainer = make_trainer(Hardware("cpu"), [bits])
    trainer.validate(WholeNetwork(chain), data_of(samples), verbose=False)


@pytest.mark.parametrize("granularity", ["pack", "layer"])
def test_it_measures_what_measure_sensitivity_measures(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe, granularity: Any
) -> None:
    bits = MixedBits(granularity=granularity, activation_candidates=[3], num_samples=30)
    for _ in range(2):
        validate(small_chain, samples, bits, small_units, small_recipe)
        expected = measure_sensitivity(
            small_chain, [samples[:24], samples[24:30]], small_units, small_recipe, None, [3], granularity
        )
        assert bits.mixed is not None
        assert bits.mixed.granularity == granularity
        assert bits.mixed.sensitivity == expected
        assert bits.plan is not None
        assert list(bits.plan.weight) == list(small_chain.layers)
        assert set(bits.plan.activation.values()) == {8, 3}
        assert bits.plan.weight["stem"] == bits.plan.weight["head"] == 8


def test_no_number_of_samples_means_all(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    bits = MixedBits(granularity="pack", weight_candidates=[3], activation_candidates=[3], num_samples=None)
    validate(small_chain, samples, bits, small_units, small_recipe)
    batches = samples.split(24)
    assert bits.mixed is not None
    assert bits.mixed.sensitivity == measure_sensitivity(small_chain, batches, small_units, small_recipe, [3], [3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "most"}, r"budget is 'most'; allowed: iso, paper, custom"),
        ({"granularity": "channel"}, r"granularity is 'channel'; allowed: pack, layer"),
        ({"budget": "custom"}, r"budget is 'custom'; allowed: custom with one of weight_average, activation_average"),
        ({"weight_average": 0}, r"weight_average is 0; allowed: a number above 0"),
        ({"bit_operations": -4}, r"bit_operations is -4; allowed: a number above 0"),
        ({"weight_candidates": []}, r"weight_candidates is \[\]; allowed: one or more of 2 to 8"),
        ({"weight_candidates": [3, 9]}, r"weight_candidates is \[3, 9\]; allowed: one or more of 2 to 8"),
        ({"activation_candidates": [1]}, r"activation_candidates is \[1\]; allowed: one or more of 2 to 8"),
        ({"num_samples": 0}, r"num_samples is 0; allowed: 1 or more, or null for all"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"bits\.init_args\.{message}"):
        MixedBits(**settings)


def run(network: nn.Module, samples: Tensor, run_dir: Path, **settings: Any) -> dict[str, Any]:
    recipe = Recipe(
        QuantizerSpec(3),
        QuantizerSpec(3, per_channel=False),
        reconstruction=ReconstructionSpec(steps=4, batch_size=16),
        tuning=TuningSpec(steps=0),
        **settings.pop("recipe", {}),
    )
    settings.setdefault("packing", NoPacking())
    return pack_ptq.quantize(network, data_of(samples), recipe, run_dir=run_dir, **settings)


def test_a_run_tells_what_it_has_decided(small_network: nn.Module, samples: Tensor, tmp_path: Path) -> None:
    report = run(small_network, samples, tmp_path / "run", bits=MixedBits(granularity="pack", weight_average=3.7))
    bits = report["bits"]
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text()))
    assert plan.mixed is not None
    assert json.loads((tmp_path / "run" / "report.json").read_text())["bits"] == bits
    assert bits["weight_average"] <= 3.7 < bits["weight_average"] + 0.4
    names = ["blocks.0", "blocks.1", "blocks.2"]
    assert list(bits["mixed"]) == list(bits["sensitivity"]) == names
    assert {pack: tuple(chosen.values()) for pack, chosen in bits["mixed"].items()} == plan.mixed.packs
    assert bits["budget"] == {"name": "iso", **plan.mixed.limits}
    assert bits["budget"]["weight_average"] == pytest.approx(3.7, abs=1e-3)
    for entry, pack in zip(bits["per_pack"][1:-1], names, strict=True):
        assert entry["weight_average"] == bits["mixed"][pack]["weight"]
        kl = bits["sensitivity"][pack]
        assert list(kl["weight"]) == list(kl["activation"]) == ["2", "3", "4"]
    total = sum(
        bits["sensitivity"][pack][kind][str(bits["mixed"][pack][kind])]
        for pack in names
        for kind in bits["mixed"][pack]
    )
    assert bits["predicted_kl"] == pytest.approx(total)
    assert {"weight_bytes", "weight_average", "predicted_kl"} == set(bits["pareto"][0])
    assert report["seconds"]["sensitivity"] > 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("pareto/predicted_kl")]
    expected = [(point["weight_bytes"], point["predicted_kl"]) for point in bits["pareto"]]
    assert curve == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]
    table = render(report, "x")
    assert f"blocks.1 {bits['mixed']['blocks.1']['weight']}/{bits['mixed']['blocks.1']['activation']} | " in table
    assert "budget iso (at most weight average 3.70, activation average " in table
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["bits"]["class_path"] == "pack_ptq.callbacks.MixedBits"
    assert config["bits"]["init_args"]["weight_average"] == 3.7


def test_a_run_tells_what_its_layers_got(small_network: nn.Module, samples: Tensor, tmp_path: Path) -> None:
    report = run(small_network, samples, tmp_path / "run", bits=MixedBits(weight_average=3.9))
    bits = report["bits"]
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text()))
    layers = [f"blocks.{block}.conv{conv}" for block in range(3) for conv in (1, 2)]
    assert list(bits["mixed"]) == list(bits["sensitivity"]) == layers
    for path, chosen in bits["mixed"].items():
        assert (plan.bits.weight[path], plan.bits.activation[path]) == (chosen["weight"], chosen["activation"])
        assert list(bits["sensitivity"][path]["weight"]) == ["2", "3", "4", "5", "6"]
    assert len({chosen["weight"] for chosen in bits["mixed"].values()}) > 1
    assert bits["granularity"] == "layer"
    per_pack = {entry["blocks"][0]: entry for entry in bits["per_pack"]}
    for block in range(3):
        mean = sum(bits["mixed"][f"blocks.{block}.conv{conv}"]["weight"] for conv in (1, 2)) / 2
        assert f"blocks.{block} {mean:.2f}/{per_pack[f'blocks.{block}']['activation_average']:.2f}" in render(
            report, "x"
        )
    assert "summed over layers" in render(report, "x")


class Outlying(nn.Module):
    """Five residual parts behind LayerNorm and GELU, in every other of which one channel is far above the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(32, 32), nn.Linear(32, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(5))
        self.up = nn.ModuleList(nn.Linear(32, 128) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(128, 32) for _ in range(5))
        for layer in self.up[::2]:
            nn.init.zeros_(layer.weight[3])
            nn.init.constant_(layer.weight[3, 0], 30)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return self.head(x)


def test_extra_codes_of_outlying_channels_are_within_the_budget(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, data = Outlying().eval(), data_of(torch.randn(64, 32))
    recipe = Recipe(
        QuantizerSpec(4),
        QuantizerSpec(4, per_channel=False),
        reconstruction=ReconstructionSpec(steps=0),
        tuning=TuningSpec(steps=0),
    )
    spent = {}
    for name, bits in (
        ("uniform", UniformBits()),
        ("iso", MixedBits()),
        ("bytes", MixedBits("custom", weight_bytes=20_000)),
    ):
        report = pack_ptq.quantize(network, data, recipe, bits=bits, run_dir=tmp_path / name)
        assert report["split_channels"]
        spent[name] = report["bits"]
    assert spent["iso"]["weight_average"] <= spent["uniform"]["weight_average"]
    assert spent["iso"]["activation_average"] <= spent["uniform"]["activation_average"]
    for kind in ("weight_average", "activation_average"):
        assert spent["iso"]["budget"][kind] == pytest.approx(spent["uniform"][kind], abs=1e-4)
    weights = sum(layer.weight.numel() for layer in (network.stem, network.head, *network.up, *network.down))
    assert spent["bytes"]["weight_average"] * weights / 8 <= 20_000


def test_the_papers_budget_is_the_same_for_packs_and_layers(
    small_chain: Chain, small_units: list[Unit], samples: Tensor, small_recipe: Recipe
) -> None:
    limits = []
    for granularity in ("pack", "layer"):
        bits = MixedBits("paper", granularity, num_samples=8)  # type: ignore[arg-type]
        validate(small_chain, samples, bits, small_units, small_recipe)
        assert bits.mixed is not None
        limits.append(bits.mixed.limits)
    assert limits[0] == limits[1]
    sizes = {path: layer.weight.numel() for path, layer in small_chain.layers.items()}
    inner = sum(size for path, size in sizes.items() if path.startswith("blocks"))
    expected = (3.5 * inner + 8 * (sum(sizes.values()) - inner)) / sum(sizes.values())
    assert limits[1]["weight_average"] == pytest.approx(expected, abs=1e-3)


def test_a_uniform_run_tells_nothing_of_it(small_network: nn.Module, samples: Tensor, tmp_path: Path) -> None:
    report = run(small_network, samples, tmp_path / "run", bits=UniformBits())
    assert set(report["bits"]) == {"weight_average", "activation_average", "per_pack"}
    assert "sensitivity" not in report["seconds"]
    assert "budget" not in render(report, "x")


def test_layers_are_left_at_their_bits(small_network: nn.Module, samples: Tensor, tmp_path: Path) -> None:
    run(small_network, samples, tmp_path / "run", bits=MixedBits("custom", weight_average=3.3))
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text()))
    network = pack_ptq.load(tmp_path / "run", small_network)
    for path, bits in plan.bits.weight.items():
        layer: Any = network.get_submodule(path)
        assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (bits, plan.bits.activation[path])
        assert int(layer.weight_quantizer.codes.max()) < 2**bits
    assert len(set(plan.bits.weight.values())) > 2


def test_only_weights_whose_bits_change_are_searched_again(
    small_network: nn.Module, samples: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    real = WeightQuantizer.set_range
    monkeypatch.setattr(WeightQuantizer, "set_range", lambda *args: (searched.append(args[2].bits), real(*args)))
    run(small_network, samples, tmp_path / "run")
    assert sorted(searched) == [3] * 8 + [8] * 2


class Residual(nn.Module):
    """One block of two layers, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(108, 6), nn.Linear(6, 108)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (x + self.b(self.a(x).relu()))[:, :5]


@pytest.mark.parametrize(
    ("protocol", "granularity", "weights"),
    [("first_last_8", "pack", 8), ("all", "pack", 4), ("boundary_high", "pack", 4), ("all", "layer", 6)],
)
def test_network_whose_only_pack_holds_the_first_and_the_last_layer(
    samples: Tensor, tmp_path: Path, protocol: Any, granularity: Any, weights: int
) -> None:
    torch.manual_seed(0)
    network = Residual()
    bits = MixedBits("custom", granularity, weight_average=9, activation_average=40)
    report = run(network, samples, tmp_path / "run", bits=bits, packing=WholePacking(), recipe={"protocol": protocol})
    assert report["bits"]["weight_average"] == weights
    assert report["packs"] == [list(report["scores"])]


def test_impossible_budgets_end_the_run_with_a_message(
    small_network: nn.Module, samples: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"bits\.init_args\.weight_average is 2; allowed: 2\.4138 or more"):
        run(small_network, samples, tmp_path / "run", bits=MixedBits(weight_average=2))


def test_a_refused_budget_leaves_the_folder_to_a_mended_one(tmp_path: Path) -> None:
    def run(average: float) -> None:
        pack_ptq.quantize(
            DigitsResNet(),
            DigitsData(num_calibration=16, batch_size=16),
            Recipe(reconstruction=ReconstructionSpec(steps=0), tuning=TuningSpec(steps=0)),
            bits=MixedBits(weight_average=average),
            run_dir=tmp_path / "run",
        )

    with pytest.raises(UserError, match=r"weight_average is 1\.0"):
        run(1.0)
    run(4.0)
