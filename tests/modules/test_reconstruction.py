"""The fit of one pack: its loss, its random choices, its optimizer, and what it leaves behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import layer_part, unit_part
from pack_ptq.graph.switch import switch
from pack_ptq.modules.pack_data import PackData
from pack_ptq.modules.reconstruction import PackReconstruction
from pack_ptq.quant.rounding import soft_rounding
from pack_ptq.types import ReconstructionSpec, Unit

UNIT = Unit("pack", ("blocks.0", "blocks.1"), 1, 3)
SPEC = ReconstructionSpec(steps=10, batch_size=16)
PLAIN = {"input_drop": 0.0, "inner_drop": 0.0}


def cached(rows: Tensor) -> Any:
    return fill(MemoryBudget(2**30), len(rows), rows.split(16), lambda x: x)


def data_for(chain: Chain, samples: Tensor, unit: Unit = UNIT) -> PackData:
    """Cache what the unit sees; the input from the quantized path is the full one, disturbed."""
    with torch.no_grad():
        switch(chain.layers.values(), "off", activations=False)
        full = chain.run(samples, 0, unit.start)
        target = chain.run(full, unit.start, unit.stop)
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(1))
    return PackData(cached(full), cached(full + 0.1 * noise), cached(target))


def module_for(chain: Chain, steps: int = 10, unit: Unit = UNIT, **settings: Any) -> PackReconstruction:
    spec = ReconstructionSpec(batch_size=16, **settings)
    module = PackReconstruction(unit_part(chain, unit, unit.name), spec, steps, seed=7)
    module.begin(torch.device("cpu"))
    return module


def squared_error(output: Tensor, target: Tensor) -> float:
    return ((output - target) ** 2).sum(1).mean().item()


def test_it_borrows_the_layers_of_its_unit_only(small_chain: Chain) -> None:
    module = module_for(small_chain)
    ours = set(small_chain.layers_of(1, 3))
    learned = {name for name, p in small_chain.network.named_parameters() if p.requires_grad}
    kinds = ("weight_quantizer.rounding", "weight_quantizer.log_factor", "input_quantizer.scale")
    assert learned == {f"{path}.{kind}" for path in ours for kind in kinds}
    for path, layer in small_chain.layers.items():
        assert (layer.weight_quantizer.mode == "soft") == (path in ours)
    assert {id(p) for p in module.parameters() if p.requires_grad} == {
        id(p) for p in small_chain.network.parameters() if p.requires_grad
    }


def test_soft_weights_begin_at_the_full_precision_weights(small_chain: Chain) -> None:
    for layer in module_for(small_chain).layers:
        quantizer, weight = layer.weight_quantizer, layer.weight
        low, high = (((limit - quantizer.zero_point) * quantizer.scale) for limit in quantizer.limits)
        clipped = torch.maximum(torch.minimum(weight, high), low)
        assert torch.allclose(quantizer(weight), clipped, atol=1e-5)


def test_hard_losses_by_hand(small_chain: Chain, samples: Tensor) -> None:
    data = data_for(small_chain, samples)
    module = module_for(small_chain)
    with torch.no_grad():
        for rounding in module.roundings:
            rounding += torch.randn(rounding.shape, generator=torch.Generator().manual_seed(2))
    settled = module.hard_loss(data)
    nearest = module.hard_loss(data, "nearest")
    assert module.layers[0].input_quantizer.drop == SPEC.inner_drop, "QDrop is on again"
    codes = [layer.weight_quantizer.hardened() for layer in module.layers]
    module.end()
    with torch.no_grad():
        switch(module.layers, "nearest", activations=True)
        x, target = data.quantized_input.tensor, data.target.tensor
        assert nearest == pytest.approx(squared_error(small_chain.run(x, 1, 3), target), rel=1e-4)
        for layer, (code, scale) in zip(module.layers, codes, strict=True):
            layer.weight_quantizer.set_codes(code, scale)
        assert settled == pytest.approx(squared_error(small_chain.run(x, 1, 3), target), rel=1e-4)


def test_hard_codes_are_integers_in_range_next_to_the_weight(small_chain: Chain) -> None:
    module = module_for(small_chain)
    with torch.no_grad():
        for rounding in module.roundings:
            rounding += 3 * torch.randn(rounding.shape, generator=torch.Generator().manual_seed(2))
    for layer, rounding in zip(module.layers, module.roundings, strict=True):
        quantizer = layer.weight_quantizer
        codes, scale = quantizer.hardened()
        assert torch.equal(codes, codes.round())
        assert codes.min() >= 0
        assert codes.max() <= 7
        exact = layer.weight / scale + quantizer.zero_point
        inside = (exact >= 0) & (exact <= 7)
        assert ((codes - exact).abs()[inside] <= 1 + 1e-4).all()
        up = soft_rounding(rounding) >= 0.5
        assert torch.equal(codes[inside], torch.where(up, exact.floor() + 1, exact.floor()).clamp(0, 7)[inside])


def test_loss_without_drop_or_penalty_by_hand(small_chain: Chain, samples: Tensor) -> None:
    data = data_for(small_chain, samples)
    module = module_for(small_chain, **PLAIN)
    full, low, target = data.rows(slice(0, 16))
    loss = module.training_step((full, low, target), 0)
    assert loss.item() == pytest.approx(squared_error(small_chain.run(low, 1, 3), target), rel=1e-5)
    loss.backward()
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in module.roundings)
    assert all(scale.grad is not None for scale in module.activation_scales)


def test_weights_of_the_squared_error(small_chain: Chain, samples: Tensor) -> None:
    data = data_for(small_chain, samples)
    weight = torch.rand(data.target.tensor.shape, generator=torch.Generator().manual_seed(4)) * 2
    weighted = replace(data, weight=cached(weight))
    module = module_for(small_chain, **PLAIN)
    batch = weighted.rows(slice(8, 24))
    with torch.no_grad():
        output = small_chain.run(batch[1], 1, 3)
        expected = (weight[8:24] * (output - batch[2]) ** 2).sum(1).mean().item()
    assert module.training_step(batch, 0).item() == pytest.approx(expected, rel=1e-5)
    hard = module.hard_loss(weighted, "nearest")
    with torch.no_grad():
        switch(module.layers, "nearest", activations=True)
        change = small_chain.run(data.quantized_input.tensor, 1, 3) - data.target.tensor
    assert hard == pytest.approx((weight * change**2).sum(1).mean().item(), rel=1e-5)
    assert hard != pytest.approx(module.hard_loss(data, "nearest"), rel=1e-3)


def test_one_layer_is_fitted_alone(small_chain: Chain, samples: Tensor) -> None:
    layer = small_chain.layers["blocks.0.conv2"]
    part = layer_part(small_chain, UNIT, "blocks.0.conv2", "01 pack")
    module = PackReconstruction(part, ReconstructionSpec(batch_size=16, **PLAIN), 10, seed=7)
    module.begin(torch.device("cpu"))
    quantizer = layer.weight_quantizer
    learned = {id(quantizer.rounding), id(quantizer.log_factor), id(layer.input_quantizer.scale)}
    assert {id(p) for p in small_chain.network.parameters() if p.requires_grad} == learned
    x = samples.new_zeros(16, 8, 6, 6).uniform_(generator=torch.Generator().manual_seed(0))
    target = x.flip(2)
    loss = module.training_step((x, x, target), 0)
    assert loss.item() == pytest.approx(squared_error(layer(x), target), rel=1e-5)


def test_penalty_begins_late_and_is_added(small_chain: Chain, samples: Tensor) -> None:
    data = data_for(small_chain, samples)
    module = module_for(small_chain, penalty_weight=0.5, **PLAIN)
    rows = data.rows(slice(0, 16))
    first, later = module.training_step(rows, 1).item(), module.training_step(rows, 6).item()
    beta = 20 + (2 - 20) * (6 - 2) / (10 - 2)
    penalty = sum((1 - (2 * soft_rounding(v) - 1).abs() ** beta).sum().item() for v in module.roundings)
    assert later - first == pytest.approx(0.5 * penalty, rel=1e-4)
    assert float(module.last_penalty) == pytest.approx(0.5 * penalty, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_input_is_mixed_elementwise(
    small_chain: Chain, samples: Tensor, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_for(small_chain, samples)
    module = module_for(small_chain, input_drop=share, inner_drop=0.0)
    seen: list[Tensor] = []
    run = small_chain.run

    def watched(x: Tensor, start: int, stop: int) -> Tensor:
        seen.append(x)
        return run(x, start, stop)

    monkeypatch.setattr(small_chain, "run", watched)
    full, low, target = data.rows(slice(0, 64))
    module.training_step((full, low, target), 0)
    assert ((seen[0] == full) | (seen[0] == low)).all()
    assert (seen[0] == full).float().mean().item() == pytest.approx(share, abs=0.02)


def test_image_is_never_mixed(small_chain: Chain, samples: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = Unit("stem", ("stem",), 0, 1)
    module = module_for(small_chain, unit=stem, input_drop=1.0, inner_drop=0.0)
    seen: list[Tensor] = []
    monkeypatch.setattr(small_chain, "run", lambda x, *_: seen.append(x) or torch.zeros(4, 1, requires_grad=True))
    module.training_step((samples[:4], samples[4:8], torch.zeros(4, 1)), 0)
    assert seen[0] is not None
    assert torch.equal(seen[0], samples[4:8])


def test_random_choices_come_from_the_fits_own_generator(small_chain: Chain, samples: Tensor) -> None:
    rows = data_for(small_chain, samples).rows(slice(0, 16))
    losses = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        module = module_for(small_chain)
        losses.append([module.training_step(rows, 0).item() for _ in range(2)])
        module.end()
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1], "drawn anew in every step"


def test_it_stays_in_evaluation_mode(small_chain: Chain) -> None:
    module = module_for(small_chain)
    assert module.train() is module
    assert not any(m.training for m in module.modules())


def test_optimizer_has_a_rate_per_kind_and_scales_fall_to_zero(small_chain: Chain) -> None:
    settings = {"rounding_lr": 0.1, "activation_scale_lr": 0.01, "weight_scale_lr": 0.001}
    module = module_for(small_chain, steps=4, **settings)
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    scales = [0.01 * scale.item() for scale in module.activation_scales]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4, *[1] * len(scales)]
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    rounding = 0.1 * (1000 / 4) ** 0.5
    assert rates[0] == pytest.approx([rounding, 0.001, *scales])
    assert rates[2] == pytest.approx([rounding, 0.0005, *[scale / 2 for scale in scales]])
    assert rates[4] == pytest.approx([rounding, 0, *[0 for _ in scales]])


def test_rates_of_zero_keep_scales_fixed(small_chain: Chain) -> None:
    module = module_for(small_chain, activation_scale_lr=0.0, weight_scale_lr=0.0)
    configured: Any = module.configure_optimizers()
    assert module.activation_scales == []
    assert len(configured["optimizer"].param_groups) == 1


def test_input_that_is_not_quantized_has_no_scale_to_learn(small_chain: Chain) -> None:
    next(iter(small_chain.layers_of(1, 3).values())).input_quantizer.set_range(None)
    assert len(module_for(small_chain).activation_scales) == 3


def test_end_forgets_the_fit(small_chain: Chain) -> None:
    module = module_for(small_chain, weight_scale_lr=0.1)
    module.end()
    for layer in module.layers:
        assert layer.weight_quantizer.rounding is None
        assert layer.weight_quantizer.log_factor is None
        assert (layer.input_quantizer.drop, layer.input_quantizer.generator) == (0.0, None)
    assert not any(p.requires_grad for p in small_chain.network.parameters())


def test_settled_share(small_chain: Chain) -> None:
    module = module_for(small_chain)
    with torch.no_grad():
        for rounding in module.roundings:
            rounding.zero_()
    assert module.settled_share() == 0
    with torch.no_grad():
        for rounding in module.roundings[:2]:
            rounding.fill_(20.0)
    assert module.settled_share() == 0.5
