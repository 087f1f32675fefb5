"""NoisyQuant: the amplitude by hand, what gets noise, what it leaves alone, and runs with it."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from e2e_helpers import _one_thread, assert_same, packs_of
from plan_helpers import plan_for
from torch import Tensor, nn

import pack_ptq
from pack_ptq import (
    Hardware,
    QuantizerSpec,
    Recipe,
    ReconstructionSpec,
    TuningSpec,
    Workplace,
    activation_noise,
    observe,
    prepare,
    reconstruct,
    set_ranges,
    tile_units,
)
from pack_ptq.activation_noise import AMPLITUDES, SAMPLES, add_noise
from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.callbacks import NoPacking
from pack_ptq.datamodules import TensorData
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, unit_part
from pack_ptq.graph.switch import quantized
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.states import put_unit_state, unit_state
from pack_ptq.types import Unit, UnitResult

__all__ = ["_one_thread"]

COUNT = 40  # more than are taken
BITS = QuantizerSpec(4), QuantizerSpec(4, per_channel=False)
RECIPE = Recipe(
    *BITS, layer_norm="per_tensor", post_softmax="uniform", split_channels=0.0, activation_noise="searched",
    reconstruction=ReconstructionSpec(steps=0), tuning=TuningSpec(steps=0), bias_correction="none",
)  # fmt: skip


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = timm.models.VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


@pytest.fixture
def images() -> Tensor:
    return random(COUNT, 1, 16, 16, seed=0)


@pytest.fixture
def chain(images: Tensor) -> Chain:
    """Give the prepared transformer with its ranges set."""
    chain = prepare(vit(), images[:2]).chain
    observe(chain, [images])
    set_ranges(chain, plan_for(chain, RECIPE), RECIPE)
    return chain


@torch.no_grad()
def noisy(chain: Chain, images: Tensor, seed: int = 0) -> Part:
    """Search noise for the whole network as one part."""
    part = unit_part(chain, Unit("pack", chain.names, 0, len(chain)), "all")
    budget = MemoryBudget(2**30)
    source, target = fill(budget, len(images), [images], lambda x: x), fill(budget, len(images), [images], part.run)
    add_noise(part, PackData(source, source, target), seed)
    return part


@torch.no_grad()
def reads(chain: Chain, images: Tensor, path: str) -> Tensor:
    """Give what a layer reads when the whole network is rounded to nearest."""
    seen: list[Tensor] = []
    handle = chain.layers[path].register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    with quantized(chain.operations, "nearest"):
        chain.network(images)
    handle.remove()
    return seen[0]


def error_by_hand(layer: QuantizedLayer, x: Tensor, noise: Tensor) -> float:
    """Give the squared error of the output, with the noise taken from the quantized input again."""
    w, q = layer.weight_quantizer, layer.input_quantizer
    weight = (((layer.weight / w.scale).round() + w.zero_point).clamp(0, 2**w.bits - 1) - w.zero_point) * w.scale
    assert q.bits is not None
    low = ((((x + noise) / q.scale).round() + q.zero_point).clamp(0, 2**q.bits - 1) - q.zero_point) * q.scale
    return (F.linear(low - noise, weight) - F.linear(x, layer.weight)).double().square().sum().item()


@torch.no_grad()
def test_amplitude_has_the_smallest_error_of_all(chain: Chain, images: Tensor) -> None:
    part = noisy(chain, images)
    found = {path: layer.noise for path, layer in part.layers.items() if layer.noise is not None}
    assert 3 <= len(found) < len(part.layers)
    for layer in part.layers.values():
        layer.noise = None
    gains = []
    for path, layer in part.layers.items():  # in execution order, so that the noise of the layers before is there
        if path in found:
            x, scale = reads(chain, images[:SAMPLES], path), layer.input_quantizer.scale.item()
            largest = found[path].abs().max() / scale
            # The draw itself reaches nearly, not quite, to its ends.
            amplitude = next(a for a in AMPLITUDES if a >= largest - 1e-6)
            errors = {a: error_by_hand(layer, x, found[path] * (a / amplitude)) for a in AMPLITUDES}
            nearest = [a for a in AMPLITUDES if abs(errors[a] - min(errors.values())) <= 1e-4 * errors[a]]
            gains.append(errors[0.0] / min(errors.values()))
            assert nearest == [amplitude], path
            layer.noise = found[path]
    assert len(gains) == len(found)
    assert min(gains) > 1, "never larger than without"


@torch.no_grad()
def test_values_between_two_codes_gain_by_noise() -> None:
    """All round to one side without it: the error is one, the same in every channel, and adds up."""
    layer = QuantizedLayer(nn.Linear(64, 8), ActivationQuantizer())
    layer.layer.weight.fill_(1.0)
    layer.weight_quantizer.set_range(layer.weight, QuantizerSpec(8), symmetric=False)
    layer.input_quantizer.zero_point.fill_(8)
    layer.input_quantizer.bits = 4
    x = 0.4 + 0.01 * random(COUNT, 64, seed=1)
    storages = [fill(MemoryBudget(2**24), COUNT, [rows], lambda v: v) for rows in (x, x, layer(x))]
    add_noise(Part("00 a", {"a": layer}, {}, layer), PackData(*storages), 0)
    assert layer.noise is not None
    assert layer.noise.abs().max() <= 2
    assert layer.noise.abs().max() > 0.3
    assert 0.3 < (layer.noise > 0).float().mean() < 0.7
    with quantized([layer], "nearest"):
        with_noise = (layer(x) - layer.layer(x)).square().mean()
        layer.noise = None
        without = (layer(x) - layer.layer(x)).square().mean()
    assert with_noise < 0.1 * without


@torch.no_grad()
def test_full_precision_stays_as_it_was(chain: Chain, images: Tensor) -> None:
    expected = chain.network(images)
    part = noisy(chain, images)
    assert torch.equal(chain.network(images), expected)
    with quantized(part.operations, "off"):
        for quantizer in part.quantizers:
            quantizer.drop = 1.0  # every element stays as it is, with the noise
        output = chain.network(images)
    assert torch.allclose(output, expected, atol=1e-4 * expected.abs().max().item())


def test_only_linear_layers_with_uniform_codes_get_noise(chain: Chain, images: Tensor) -> None:
    chain.layers["blocks.0.attn.qkv"].input_quantizer.set_range(None)
    chain.layers["blocks.0.mlp.fc2"].input_quantizer.set_range(BITS[1], "focusing")
    part = noisy(chain, images)
    found = {path for path, layer in part.layers.items() if layer.noise is not None}
    assert found
    assert not found & {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc2"}
    for path in found:
        layer = part.layers[path]
        assert layer.noise is not None
        assert layer.noise.shape == (layer.weight.shape[1],)
        assert layer.inputs is None
        assert not layer.noise.requires_grad
    set_ranges(chain, plan_for(chain, RECIPE), RECIPE)
    assert all(layer.noise is None for layer in part.layers.values()), "new ranges want new noise"


def test_seeds_decide_the_noise(chain: Chain, images: Tensor) -> None:
    def found(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        part = noisy(copy.deepcopy(chain), images, seed)
        return {path: layer.noise for path, layer in part.layers.items() if layer.noise is not None}

    first = found(0, 0)
    assert_same(first, found(0, 1))
    other = found(1, 0)
    assert all(not torch.equal(first[path], other[path]) for path in first.keys() & other.keys())
    per_layer = [noise[:16] / noise.abs().max() for noise in first.values()]
    assert not torch.allclose(per_layer[0], per_layer[1]), "every layer has its own"


def test_all_processes_take_the_draw_of_the_first(
    chain: Chain, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process contributes nothing to the sum of the draws, and its share to that of the errors."""
    sent: list[Tensor] = []

    def reduce(x: Tensor, how: str = "sum") -> Tensor:
        sent.append(x.clone())
        return x + 1 if x.dtype == torch.float32 else x

    monkeypatch.setattr(activation_noise, "world", lambda: (1, 2))
    monkeypatch.setattr(activation_noise, "all_reduce", reduce)
    part = noisy(chain, images, seed=1)
    draws, errors = sent[::2], sent[1::2]
    assert all(not draw.any() for draw in draws)
    assert all(error.shape == (len(AMPLITUDES),) and (error > 0).all() for error in errors)
    for layer in part.layers.values():
        assert layer.noise is None or len(layer.noise.unique()) == 1, "the sum that came back, stretched"


def test_states_hold_the_noise(chain: Chain, images: Tensor) -> None:
    part = noisy(chain, images)
    unit = Unit("pack", chain.names, 0, len(chain))
    state = unit_state(chain, unit, UnitResult("x", ("x",), 0, 1.0, 1.0, False, 0.0))
    other = prepare(vit(), images[:2]).chain
    other.layers["head"].noise = torch.ones(16)
    put_unit_state(other, copy.deepcopy(state))
    for path, layer in part.layers.items():
        assert_same(layer.noise, other.layers[path].noise)
    for values in state["layers"].values():
        del values["noise"]  # as older runs have it
    put_unit_state(other, state)
    assert all(layer.noise is None for layer in other.layers.values())


@pytest.mark.parametrize("settings", [{}, {"granularity": "layer"}, {"loss": "fisher"}])
def test_fits_go_on_from_the_noise(chain: Chain, images: Tensor, settings: dict[str, Any]) -> None:
    fit = ReconstructionSpec(steps=3, batch_size=8, bias_lr=0.01, **settings)
    recipe = Recipe(*BITS, activation_noise="searched", reconstruction=fit, bias_correction="none")
    results = reconstruct(
        chain, tile_units(chain, [(0, 1), (1, 2)]), [images], recipe, Workplace(hardware=Hardware("cpu"))
    )
    assert any(layer.noise is not None for layer in chain.layers.values())
    assert all(result.final_loss <= result.nearest_loss for result in results if "granularity" not in settings)
    assert torch.isfinite(chain.network(images)).all()


def run(run_dir: Path) -> dict[str, Any]:
    inputs = random(16, 1, 16, 16, seed=0)
    data = TensorData(inputs, (inputs, torch.arange(16) % 3), batch_size=8)
    return pack_ptq.quantize(vit(), data, RECIPE, packing=NoPacking(), run_dir=run_dir)


def test_runs_resume_and_load_with_their_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(tmp_path / "whole")
    real = os.replace

    def killing(source: Any, target: Any) -> None:
        real(source, target)
        if str(target).endswith("packs/001.pt"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    assert not (tmp_path / "killed" / "packs" / "002.pt").exists()
    resumed = run(tmp_path / "killed")
    assert resumed["metrics"] == report["metrics"]
    packs = packs_of(tmp_path / "whole")
    assert_same(packs_of(tmp_path / "killed"), packs)
    noise = {path: values["noise"] for pack in packs.values() for path, values in pack["layers"].items()}
    assert sum(each is not None for each in noise.values()) >= 3
    x = random(9, 1, 16, 16, seed=1)
    loaded = [pack_ptq.load(tmp_path / name, network=vit(seed=5))(x) for name in ("whole", "killed")]
    assert torch.equal(*loaded)
    network = pack_ptq.load(tmp_path / "whole", network=vit())
    held = {name: module.noise for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}
    assert_same(held, noise)
    for module in network.modules():
        if isinstance(module, QuantizedLayer):
            module.noise = None
    assert not torch.equal(network(x), loaded[0])
