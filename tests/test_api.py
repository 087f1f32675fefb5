"""The Python interface: networks and tensors in hand, every protocol, profile and packing, and `load`."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from e2e_helpers import NaNWeight, TinyNet, _one_thread, assert_same, packs_of

import pack_ptq
from pack_ptq import ModelSource, QuantizerSpec, Recipe, ReconstructionSpec, UserError, api
from pack_ptq.callbacks import FixedPacking, HessianPacking, HessianScoring, NoPacking, RandomPacking, WholePacking
from pack_ptq.datamodules import DigitsData, TensorData
from pack_ptq.graph.switch import switch
from pack_ptq.models import DigitsResNet
from pack_ptq.types import TuningSpec

__all__ = ["_one_thread"]

DIGITS = ModelSource(class_path="pack_ptq.models.DigitsResNet")
OFF = TuningSpec(steps=0)


def tiny() -> TinyNet:
    torch.manual_seed(0)
    network = TinyNet()
    network.norm.running_var.fill_(2)
    return network.eval()


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def samples(seed: int = 0) -> TensorData:
    test = noise(21, seed=9)
    return TensorData(noise(18, seed), (test, tiny()(test).argmax(1)), batch_size=8)


def recipe(weight: int = 4, activation: int = 4, steps: int = 4, **more: Any) -> Recipe:
    return Recipe(
        QuantizerSpec(weight),
        QuantizerSpec(activation, per_channel=False),
        reconstruction=ReconstructionSpec(steps=steps, batch_size=8),
        **{"tuning": OFF, **more},
    )


@pytest.fixture
def captured(monkeypatch) -> list:
    """Collects the prepared networks of runs, which end with what the run measured."""
    prepared, original = [], api.prepare_for
    monkeypatch.setattr(api, "prepare_for", lambda *args: prepared.append(original(*args)) or prepared[-1])
    return prepared


def run_output(captured: list, x: torch.Tensor) -> torch.Tensor:
    """Compute with the hard codes of the run that has just ended, in its own network."""
    (prepared,) = captured
    switch(prepared.chain.layers.values(), "hard", activations=True)
    return prepared.chain.network(x)


def test_a_network_and_tensors_in_hand(tmp_path, captured):
    network = tiny()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = pack_ptq.quantize(network, samples(), recipe(8, 8), run_dir=tmp_path / "run")
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metrics"]["num_samples"] == 21
    assert report["metrics"]["full_precision"]["top1"] == 100
    assert report["metrics"]["quantized"]["top1"] > 80
    assert_same(dict(network.state_dict()), before)
    again = pack_ptq.load(tmp_path / "run", network=TinyNet())
    assert torch.equal(again(noise(30, 5)), run_output(captured, noise(30, 5)))
    assert not torch.equal(again(noise(30, 5)), network(noise(30, 5)))


def test_a_network_in_half_precision_is_quantized_in_float32(tmp_path):
    network = tiny().bfloat16()
    pack_ptq.quantize(network, samples(), recipe(), run_dir=tmp_path / "half")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    pack_ptq.quantize(copy.deepcopy(network).float(), samples(), recipe(), run_dir=tmp_path / "full")
    outputs = [pack_ptq.load(tmp_path / name, network=network)(noise(4)) for name in ("half", "full")]
    assert torch.equal(*outputs)


class SharedParts(torch.nn.Module):
    """Two parts, each under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, 6, 1), torch.nn.Linear(6, 5)
        parts = [torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), torch.nn.ReLU()) for _ in range(2)]
        self.body = torch.nn.Sequential(*parts, *parts)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_a_network_with_parts_under_two_names_is_loaded(tmp_path, captured):
    torch.manual_seed(0)
    test = noise(21, seed=9)
    data = TensorData(noise(18), (test, torch.arange(21) % 5), batch_size=8)
    pack_ptq.quantize(SharedParts().eval(), data, recipe(), run_dir=tmp_path / "run")
    loaded = pack_ptq.load(tmp_path / "run", network=SharedParts())
    assert torch.equal(loaded(test), run_output(captured, test))


def test_load_without_the_object_says_what_is_missing(tmp_path):
    class Local(TinyNet):
        pass

    pack_ptq.quantize(Local().eval(), samples(), recipe(steps=1), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="model"):
        pack_ptq.load(tmp_path / "run")
    pack_ptq.load(tmp_path / "run", network=Local())


def test_loaded_network_gives_the_outputs_of_the_run(tmp_path, captured):
    data = DigitsData(num_calibration=64, batch_size=32)
    report = pack_ptq.quantize(DIGITS, data, recipe(3, 3), run_dir=tmp_path / "run")
    network = pack_ptq.load(tmp_path / "run")
    x, labels = data.test_dataset()[:]
    output = network(x)
    assert torch.equal(output, run_output(captured, x))
    top1 = 100 * (output.argmax(1) == labels).double().mean().item()
    assert top1 == pytest.approx(report["metrics"]["quantized"]["top1"], abs=1e-4)
    assert pack_ptq.evaluate(tmp_path / "run", DigitsData()) == report["metrics"]["quantized"]


def test_loading_does_not_need_the_checkpoint(tmp_path, captured):
    torch.manual_seed(3)
    own = DigitsResNet(pretrained=False)
    checkpoint = tmp_path / "own.pt"
    torch.save(own.state_dict(), checkpoint)
    source = ModelSource(
        class_path="pack_ptq.models.DigitsResNet", init_args={"pretrained": False}, checkpoint=str(checkpoint)
    )
    data = DigitsData(num_calibration=32, batch_size=32)
    report = pack_ptq.quantize(source, data, recipe(4, 4, steps=2), run_dir=tmp_path / "run")
    checkpoint.unlink()
    x = data.test_dataset()[:][0]
    assert torch.equal(pack_ptq.load(tmp_path / "run")(x), run_output(captured, x))
    assert pack_ptq.evaluate(tmp_path / "run", data) == report["metrics"]["quantized"]


def test_blocks_by_hand_last_until_loading(tmp_path, captured):
    source = ModelSource(class_path="pack_ptq.models.DigitsResNet", blocks=["layer1", "layer2.*", "layer3"])
    data = DigitsData(num_calibration=32, batch_size=32)
    report = pack_ptq.quantize(source, data, recipe(steps=1), packing=NoPacking(), run_dir=tmp_path / "run")
    assert report["packs"] == [["layer1"], ["layer2.0"], ["layer2.1"], ["layer3"]]
    x = data.test_dataset()[:][0]
    assert torch.equal(pack_ptq.load(tmp_path / "run")(x), run_output(captured, x))


TUNING = TuningSpec(steps=20, batch_size=16, weight_scale_lr=1e-3, bias_lr=1e-3, held_out=0.25)


@pytest.mark.parametrize("profile", ["paper", "deploy"])
def test_a_tuned_network_loads_as_it_was_measured(profile, tmp_path, captured):
    torch.manual_seed(3)
    checkpoint = tmp_path / "own.pt"
    torch.save(DigitsResNet().state_dict(), checkpoint)
    source = ModelSource(
        class_path="pack_ptq.models.DigitsResNet", init_args={"pretrained": False}, checkpoint=str(checkpoint)
    )
    data = DigitsData(num_calibration=48, batch_size=32)
    settings = recipe(2, 3, steps=2, profile=profile, tuning=TUNING)
    report = pack_ptq.quantize(source, data, settings, run_dir=tmp_path / "run")
    tuning = report["tuning"]
    assert set(tuning) == {"steps", "before", "after", "accepted", "seconds", "rate_share"}
    assert tuning["steps"] == 40
    assert tuning["accepted"]
    assert tuning["after"] < tuning["before"]
    assert report["seconds"]["tuning"] == tuning["seconds"] > 0
    x, labels = data.test_dataset()[:]
    expected = run_output(captured, x)
    for there in (True, False):
        if not there:
            checkpoint.unlink()
        network = pack_ptq.load(tmp_path / "run")
        assert torch.equal(network(x), expected)
    assert 100 * (expected.argmax(1) == labels).double().mean().item() == pytest.approx(
        report["metrics"]["quantized"]["top1"], abs=1e-4
    )
    with torch.no_grad():
        own = DigitsResNet().eval()(x)
    found = report["fidelity"]["quantized"]
    divergence = F.kl_div(expected.log_softmax(1), own.log_softmax(1), reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(divergence.item(), rel=1e-3), "from the network as it was given"
    assert found["agreement"] == pytest.approx(100 * (expected.argmax(1) == own.argmax(1)).double().mean().item())
    assert found["kl"] < report["fidelity"]["rounded_to_nearest"]["kl"]
    assert set(report["fidelity"]) == {"rounded_to_nearest", "quantized"}
    assert pack_ptq.evaluate(tmp_path / "run", DigitsData()) == report["metrics"]["quantized"]
    (tmp_path / "run" / "tuned.pt").unlink()
    with pytest.raises(UserError, match="their tuning is still to do"):
        pack_ptq.load(tmp_path / "run")


def test_tuning_alone_without_a_fit(tmp_path, captured):
    report = pack_ptq.quantize(tiny(), samples(), recipe(3, 3, steps=0, tuning=TUNING), run_dir=tmp_path / "run")
    assert [unit["steps"] for unit in report["reconstruction"]] == [0] * len(report["reconstruction"])
    assert report["tuning"]["after"] < report["tuning"]["before"]
    x = noise(9, 4)
    assert torch.equal(pack_ptq.load(tmp_path / "run", network=TinyNet())(x), run_output(captured, x))


def test_no_tuning_if_not_wanted_or_in_a_run_from_before_there_was_one(tmp_path):
    report = pack_ptq.quantize(tiny(), samples(), recipe(steps=1), run_dir=tmp_path / "run")
    assert report["tuning"] is None
    assert report["seconds"]["tuning"] == 0
    assert not (tmp_path / "run" / "tuned.pt").exists()
    config = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(config.read_text())
    del older["recipe"]["tuning"]
    config.write_text(yaml.safe_dump(older))
    pack_ptq.load(tmp_path / "run", network=TinyNet())


class Mirrored(TensorData):
    augments = True

    def augment(self, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.where(torch.rand(len(inputs), 1, 1, 1, generator=generator) < 0.5, inputs.flip(3), inputs)


def test_views_change_the_tuning_alone_and_only_of_data_that_augments(tmp_path):
    test, tuned = noise(21, seed=9), {}
    for kind in (TensorData, Mirrored):
        data = kind(noise(18), (test, tiny()(test).argmax(1)), batch_size=8)
        for views in (1, 3):
            run_dir = tmp_path / f"{kind.__name__}{views}"
            settings = recipe(2, steps=1, tuning=TuningSpec(steps=20, batch_size=16, views=views))
            pack_ptq.quantize(tiny(), data, settings, run_dir=run_dir)
            content = torch.load(run_dir / "tuned.pt", weights_only=True)
            assert content["result"]["accepted"]
            tuned[run_dir.name] = content["biases"]
            assert_same(packs_of(tmp_path / "TensorData1"), packs_of(run_dir))
    plain = tuned.pop("TensorData1")
    changed = tuned.pop("Mirrored3")
    for same in tuned.values():
        assert_same(plain, same)
    with pytest.raises(AssertionError):
        assert_same(plain, changed)


def test_tuning_is_done_if_nothing_is_set_and_needs_two_samples(tmp_path):
    test = noise(21, seed=9)
    one = TensorData(noise(1), (test, tiny()(test).argmax(1)), batch_size=1)
    fit = ReconstructionSpec(steps=1)
    with pytest.raises(UserError, match=r"recipe\.tuning\.steps is 100; allowed: 0 with fewer than 2 calibration"):
        pack_ptq.quantize(tiny(), one, Recipe(budget="fast", reconstruction=fit), run_dir=tmp_path / "one")
    assert not (tmp_path / "one").exists()
    pack_ptq.quantize(tiny(), one, recipe(steps=1), run_dir=tmp_path / "one")
    two = TensorData(noise(2), (test, tiny()(test).argmax(1)), batch_size=2)
    report = pack_ptq.quantize(tiny(), two, Recipe(budget="fast", reconstruction=fit), run_dir=tmp_path / "two")
    assert report["tuning"]["steps"] == 200
    assert report["tuning"]["after"] <= report["tuning"]["before"]


class NoBias(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Identity()
        for layer in (self.stem, self.block1.a, self.block1.b, self.block2.a, self.block2.b, self.head):
            layer.bias = None


def test_biases_alone_are_not_tuned_where_there_are_none(tmp_path):
    settings = recipe(steps=1, tuning=TuningSpec(steps=2, weight_scale_lr=0, activation_scale_lr=0))
    with pytest.raises(UserError, match=r"recipe\.tuning\.bias_lr is 0\.01"):
        pack_ptq.quantize(NoBias(), samples(), settings, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    report = pack_ptq.quantize(NoBias(), samples(), recipe(steps=1, tuning=TUNING), run_dir=tmp_path / "run")
    assert report["tuning"]["after"] <= report["tuning"]["before"]
    pack_ptq.load(tmp_path / "run", network=NoBias())


def bits_of(run_dir: Path) -> tuple[dict[str, int], dict[str, int | None]]:
    bits = json.loads((run_dir / "plan.json").read_text())["bits"]
    return bits["weight"], bits["activation"]


@pytest.mark.parametrize("profile", ["paper", "deploy"])
@pytest.mark.parametrize("protocol", ["all", "first_last_8", "boundary_high"])
def test_protocols_and_profiles(protocol, profile, tmp_path, captured):
    report = pack_ptq.quantize(
        tiny(), samples(), recipe(3, 3, steps=2, protocol=protocol, profile=profile), run_dir=tmp_path / "run"
    )
    assert (report["protocol"], report["profile"]) == (protocol, profile)
    weight, activation = bits_of(tmp_path / "run")
    inner = [path for path in weight if path not in ("stem", "head")]
    assert {weight[path] for path in inner} == {activation[path] for path in inner} == {3}
    ends = {"all": (3, None, 3, 3), "first_last_8": (8, 8, 8, 8)}.get(protocol)
    found = weight["stem"], activation["stem"], weight["head"], activation["head"]
    assert found == ends if ends else min(weight["stem"], weight["head"]) > 3
    for content in packs_of(tmp_path / "run").values():
        for path, layer in content["layers"].items():
            low, high = (-(2 ** (weight[path] - 1)), 2 ** (weight[path] - 1) - 1) if profile == "deploy" else (
                0, 2 ** weight[path] - 1
            )  # fmt: skip
            assert layer["codes"].dtype == (torch.int8 if profile == "deploy" else torch.uint8)
            assert low <= layer["codes"].min()
            assert layer["codes"].max() <= high
            assert (profile == "deploy") == (not layer["zero_point"].any())
    x = noise(9, 4)
    assert torch.equal(pack_ptq.load(tmp_path / "run", network=TinyNet())(x), run_output(captured, x))


PACKINGS = {
    "hessian": (lambda: HessianPacking(), None),
    "hessian, at most one": (lambda: HessianPacking(max_blocks=1), [1] * 6),
    "none": (lambda: NoPacking(), [1] * 6),
    "fixed": (lambda: FixedPacking(4), [4, 2]),
    "random": (lambda: RandomPacking(seed=1), None),
    "whole": (lambda: WholePacking(), [6]),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_packings(name, tmp_path):
    make, sizes = PACKINGS[name]
    data = DigitsData(num_calibration=32, batch_size=32)
    report = pack_ptq.quantize(DIGITS, data, recipe(steps=1), packing=make(), run_dir=tmp_path / "run")
    blocks = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (0, 1)]
    assert [block for pack in report["packs"] for block in pack] == blocks
    if sizes:
        assert [len(pack) for pack in report["packs"]] == sizes
    units = len(report["packs"]) + 2
    assert [path.name for path in sorted((tmp_path / "run" / "packs").iterdir())] == [
        f"{i:03d}.pt" for i in range(units)
    ]


def test_scoring_on_the_labelled_loss_and_some_samples(tmp_path):
    data, scoring = DigitsData(num_calibration=32, batch_size=16), HessianScoring("task", num_samples=20)
    pack_ptq.quantize(DIGITS, data, recipe(steps=1), scoring=scoring, run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["scores"]["num_samples"] == 20


def test_few_steps_beat_rounding_to_nearest(tmp_path):
    report = pack_ptq.quantize(DIGITS, DigitsData(256), recipe(2, 4, steps=100), run_dir=tmp_path / "run")
    metrics = report["metrics"]
    assert metrics["quantized"]["top1"] > metrics["rounded_to_nearest"]["top1"] + 3


def test_a_cache_on_disk_gives_the_same_codes(tmp_path):
    for name, size in (("memory", 2**30), ("disk", 40_000)):
        spec = ReconstructionSpec(steps=3, batch_size=8, cache_bytes=size)
        whole = Recipe(reconstruction=spec, tuning=OFF)
        pack_ptq.quantize(tiny(), samples(), whole, run_dir=tmp_path / name)
    assert_same(packs_of(tmp_path / "memory"), packs_of(tmp_path / "disk"))


def test_another_seed_gives_other_codes(tmp_path):
    for seed in (0, 1):
        pack_ptq.quantize(DIGITS, DigitsData(64), recipe(3, 3, steps=20), seed=seed, run_dir=tmp_path / str(seed))
    first, second = packs_of(tmp_path / "0"), packs_of(tmp_path / "1")
    with pytest.raises(AssertionError):
        assert_same(first, second)


def test_refusals_in_python(tmp_path):
    with pytest.raises(UserError, match=r"block1\.b\.weight"):
        pack_ptq.quantize(NaNWeight(), samples(), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="seed is -1"):
        pack_ptq.quantize(tiny(), samples(), seed=-1, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"seed is 4294967296; allowed: 0 or more, up to 4294967295"):
        pack_ptq.quantize(tiny(), samples(), seed=2**32, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"hardware\.devices is 19; allowed: 1 to 18"):
        pack_ptq.quantize(tiny(), samples(), hardware=pack_ptq.Hardware("cpu", 19), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="run_dir"):
        pack_ptq.load(tmp_path)
    assert not (tmp_path / "run").exists()
