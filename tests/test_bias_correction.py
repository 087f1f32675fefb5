"""Bias correction: the mean output error by hand, what it leaves alone, and fits that start from it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Hardware, QuantizerSpec, Recipe, Workplace, observe, prepare, reconstruct, set_ranges
from pack_ptq.bias_correction import correct_biases
from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import Part, unit_part
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.report import size_summary
from pack_ptq.states import put_unit_state, unit_state
from pack_ptq.types import BitPlan, LowRankSpec, TuningSpec, Unit, UnitResult

COUNT = 50  # three whole batches and a partial one
RESULT = UnitResult("x", ("x",), 1, 1.0, 1.0, True, 0.0)


class Owned(nn.Module):
    """As torchvision's Swin has its `qkv`: a layer that is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


@pytest.fixture
def small_recipe(small_recipe: Recipe) -> Recipe:
    """Leave to the corrections measured here what weights add on average."""
    return replace(small_recipe, bias_correction="none")


def whole(chain: Chain) -> Unit:
    return Unit("pack", chain.names, 0, len(chain))


@torch.no_grad()
def corrected(chain: Chain, samples: Tensor) -> tuple[Part, list[float]]:
    """Correct the biases of the whole network as one part."""
    x, budget = samples[:COUNT], MemoryBudget(2**30)
    low, target = fill(budget, COUNT, [x], lambda v: v), fill(budget, COUNT, [x], chain.network)
    part = unit_part(chain, whole(chain), "all")
    return part, correct_biases(part, PackData(low, low, target))


@torch.no_grad()
def inputs_of(chain: Chain, samples: Tensor) -> dict[str, Tensor]:
    """Give what every layer reads in the quantized network."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, path=path: seen.update({path: args[0]}))
        for path, layer in chain.layers.items()
    ]
    with quantized(chain.operations, "nearest"):
        chain.network(samples[:COUNT])
    for handle in handles:
        handle.remove()
    return seen


def calibrated(network: nn.Module, x: Tensor, bits: int, profile: Any = "paper") -> Chain:
    chain = prepare(network.eval(), x).chain
    low = QuantizerSpec(bits), QuantizerSpec(bits, per_channel=False)
    recipe = Recipe(*low, profile=profile, protocol="all", bias_correction="none")
    observe(chain, [x])
    set_ranges(chain, plan_for(chain, recipe), recipe)
    return chain


def channel_means(layer: QuantizedLayer, y: Tensor) -> Tensor:
    return y.mean([axis for axis in range(y.ndim) if axis != (y.ndim - 1 if isinstance(layer.layer, nn.Linear) else 1)])


def by_hand(layer: QuantizedLayer, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the outputs with full numbers, and with rounded ones and a bias of one's own."""
    w, q = layer.weight_quantizer, layer.input_quantizer
    low_weight = ((layer.weight / w.scale).round() + w.zero_point).clamp(0, 2**w.bits - 1) - w.zero_point
    low_x = x
    if q.bits is not None:
        low_x = (((x / q.scale).round() + q.zero_point).clamp(0, 2**q.bits - 1) - q.zero_point) * q.scale
    if isinstance(layer.layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias), F.linear(low_x, low_weight * w.scale, bias)
    inner: Any = layer.layer
    own = (inner.stride, inner.padding, inner.dilation, inner.groups)
    return F.conv2d(x, layer.weight, layer.bias, *own), F.conv2d(low_x, low_weight * w.scale, bias, *own)


def test_mean_output_error_of_every_layer_is_0(small_chain: Chain, samples: Tensor) -> None:
    """Of convolutions and of the linear head, on the inputs that they read before anything is corrected."""
    inputs = inputs_of(small_chain, samples)
    part, errors = corrected(small_chain, samples)
    assert {type(layer.layer) for layer in part.layers.values()} == {nn.Conv2d, nn.Linear}
    for (path, layer), error in zip(part.layers.items(), errors, strict=True):
        wanted, low = by_hand(layer, inputs[path], layer.bias)
        assert layer.correction is not None
        assert layer.correction.shape == layer.bias.shape  # type: ignore[union-attr]
        assert torch.allclose(layer.correction, channel_means(layer, wanted - low), atol=1e-5)
        assert error == pytest.approx((wanted - low).square().mean().sqrt().item(), rel=1e-4)
        with quantized([layer], "nearest"):
            left = channel_means(layer, wanted - layer(inputs[path]))
        assert left.abs().max() < 1e-5
        assert channel_means(layer, wanted - low).abs().max() > 1e-4, "there was something to correct"


def test_with_the_mean_inputs_part_less_is_left_to_correct(small_chain: Chain, samples: Tensor) -> None:
    part, _ = corrected(small_chain, samples)
    alone = {path: layer.correction for path, layer in part.layers.items()}
    for layer in small_chain.layers.values():
        layer.corrects_mean = True
        layer.correction = None
    inputs = inputs_of(small_chain, samples)
    corrected(small_chain, samples)
    for path, layer in part.layers.items():
        if path != "stem":  # which reads noise with a mean of 0
            assert layer.correction.norm() < 0.5 * alone[path].norm()  # type: ignore[union-attr]
        with quantized([layer], "nearest"), torch.no_grad():
            left = channel_means(layer, layer.layer(inputs[path]) - layer(inputs[path]))
        assert left.abs().max() < 1e-5


def test_layers_without_bias_have_no_correction(small_chain: Chain, samples: Tensor) -> None:
    bare: Any = small_chain.layers["head"].layer
    bare.bias = None
    part, errors = corrected(small_chain, samples)
    assert [path for path, layer in part.layers.items() if layer.correction is None] == ["head"]
    assert errors[-1] > 0
    assert bare.bias is None


def test_grouped_strided_and_transposed_convolutions(samples: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    chain = calibrated(network, samples[:COUNT], 3)
    inputs = inputs_of(chain, samples)
    part, _ = corrected(chain, samples)
    for path, layer in part.layers.items():
        with quantized([layer], "nearest"), torch.no_grad():
            left = layer.layer(inputs[path]) - layer(inputs[path])
        assert left.mean((0, 2, 3)).abs().max() < 1e-5


@torch.no_grad()
def test_full_precision_is_untouched(small_chain: Chain, samples: Tensor) -> None:
    expected = small_chain.network(samples)
    before = {path: layer.bias.clone() for path, layer in small_chain.layers.items() if layer.bias is not None}
    corrected(small_chain, samples)
    assert torch.equal(small_chain.network(samples), expected)
    assert all(torch.equal(bias, small_chain.layers[path].bias) for path, bias in before.items())
    switch(small_chain.operations, "nearest", activations=True)
    assert not torch.equal(small_chain.network(samples), expected)


def test_a_second_time_changes_nothing(small_chain: Chain, samples: Tensor) -> None:
    """Each layer's error is measured behind corrected ones then, so the first layer is compared."""
    part, _ = corrected(small_chain, samples)
    first = part.layers["stem"].correction
    corrected(small_chain, samples)
    assert first is not None
    assert torch.allclose(part.layers["stem"].correction, first, atol=1e-6)  # type: ignore[arg-type]


def test_a_layer_that_is_never_called_itself_is_corrected() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Owned(), nn.ReLU(), nn.Linear(6, 3)), torch.randn(64, 4)
    chain = calibrated(network, x, 3)
    part, errors = corrected(chain, x)
    owned = part.layers["2.fc"].correction
    assert all(error > 0 for error in errors)
    assert owned is not None
    assert owned.shape == (6,)
    assert torch.isfinite(owned).all()


@torch.no_grad()
def test_a_unit_keeps_its_corrections_in_its_file(
    small_chain: Chain, small_network: nn.Module, samples: Tensor, tmp_path: Path
) -> None:
    corrected(small_chain, samples)
    for layer in small_chain.layers.values():
        quantizer = layer.weight_quantizer
        quantizer.set_codes(quantizer.nearest_codes(layer.weight), quantizer.scale)
    torch.save(unit_state(small_chain, whole(small_chain), RESULT), tmp_path / "unit.pt")
    other = prepare(small_network, samples[:4]).chain
    put_unit_state(other, torch.load(tmp_path / "unit.pt", weights_only=True))
    for chain in (small_chain, other):
        switch(chain.operations, "hard", activations=True)
    assert torch.equal(other.network(samples), small_chain.network(samples))
    for path, layer in other.layers.items():
        assert torch.equal(layer.correction, small_chain.layers[path].correction)  # type: ignore[arg-type]
        assert not layer.correction.requires_grad  # type: ignore[union-attr]


@torch.no_grad()
def test_int32_bias_includes_the_correction(small_network: nn.Module, samples: Tensor) -> None:
    chain = calibrated(small_network, samples, 4, "deploy")
    inputs = inputs_of(chain, samples)
    part, _ = corrected(chain, samples)
    for path, layer in part.layers.items():
        if layer.input_quantizer.bits is None:  # the image has no scale
            continue
        step = layer.weight_quantizer.scale.flatten() * layer.input_quantizer.scale
        steps = (layer.bias + layer.correction) / step  # type: ignore[operator]
        assert torch.equal(layer.rounded_bias(layer.corrected_bias(layer.weight)), steps.round() * step)
        with quantized([layer], "nearest"):
            left = channel_means(layer, layer.layer(inputs[path]) - layer(inputs[path]))
        assert (left.abs() <= step * 1.001 + 1e-5).all(), "twice half a step: once measured, once rounded"


def fitted(chain: Chain, units: list[Unit], batches: list[Tensor], recipe: Recipe, **settings: Any) -> Any:
    chain = copy.deepcopy(chain)
    recipe = replace(recipe, reconstruction=replace(recipe.reconstruction, **settings))
    return chain, reconstruct(chain, units, batches, recipe, Workplace(hardware=Hardware("cpu")))


def test_a_fit_with_corrections_is_no_worse(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], small_recipe: Recipe
) -> None:
    plain, without = fitted(small_chain, small_units, batches, small_recipe)
    chain, with_biases = fitted(small_chain, small_units, batches, small_recipe, bias_lr=0.1)
    assert with_biases[-1].final_loss <= without[-1].final_loss
    assert all(result.final_loss <= result.nearest_loss for result in with_biases)
    assert all(layer.correction is None for layer in plain.layers.values())
    for layer in chain.layers.values():
        assert torch.isfinite(layer.correction).all()
        assert not layer.correction.requires_grad


@pytest.mark.parametrize(
    "settings", [{}, {"rounding_lr": 100.0, "steps": 2, "evaluations": 1}], ids=["kept", "rejected"]
)
@torch.no_grad()
def test_results_are_losses_of_the_network_as_it_is_left(
    small_chain: Chain, small_units: list[Unit], batches: list[Tensor], samples: Tensor, small_recipe: Recipe,
    settings: dict,
) -> None:  # fmt: skip
    with torch.enable_grad():
        chain, results = fitted(small_chain, small_units, batches, small_recipe, bias_lr=0.1, **settings)
    if settings:
        assert not all(result.accepted for result in results)
    low = full = samples
    for unit, result in zip(small_units, results, strict=True):
        switch(chain.operations, "off", activations=False)
        full = chain.run(full, unit.start, unit.stop)
        switch(chain.operations, "hard", activations=True)
        low = chain.run(low, unit.start, unit.stop)
        assert result.final_loss == pytest.approx((low - full).square().sum(1).mean().item(), rel=1e-4)


def test_a_rejected_low_rank_fit_leaves_the_loss_that_is_told(samples: Tensor) -> None:
    """Its corrections are those of compensated weights, which are gone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    x = samples.flatten(1)[:, :6].contiguous()
    chain = calibrated(network, x, 3)
    harmful = LowRankSpec((2,), search_steps=1, fit_steps=5, learning_rate=100.0)
    fit_only = TuningSpec(steps=0)
    recipe = Recipe(QuantizerSpec(3), QuantizerSpec(3, per_channel=False), protocol="all", tuning=fit_only)
    chain, (result,) = fitted(
        chain, [whole(chain)], [x], recipe, bias_lr=0.1, steps=2, batch_size=16, low_rank=harmful, rounding_lr=100.0
    )
    assert not result.accepted
    with torch.no_grad():
        low = chain.network(x)
        switch(chain.operations, "off", activations=False)
        error = (low - chain.network(x)).square().sum(1).mean().item()
    assert result.final_loss == pytest.approx(error, rel=1e-4)


def test_sizes_are_those_without_corrections(small_chain: Chain, samples: Tensor, small_plan: BitPlan) -> None:
    """A correction becomes part of its bias, and full precision has none."""
    before = size_summary(small_chain, small_plan)
    corrected(small_chain, samples)
    assert size_summary(small_chain, small_plan) == before
