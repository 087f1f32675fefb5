"""The last pass: what it learns, how fast, towards what, and what it leaves behind."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pack_ptq import prepare
from pack_ptq.cache import MemoryBudget, fill
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.modules import tuning
from pack_ptq.modules.tuning import NetworkData, NetworkTuning, averaged_over_views, check_tuning
from pack_ptq.types import Recipe, TuningSpec

SPEC = TuningSpec(steps=10, batch_size=16, weight_scale_lr=1e-3, activation_scale_lr=2e-3, bias_lr=3e-3)


@pytest.fixture
def hard_chain(small_chain: Chain) -> Chain:
    """Give the network rounded to nearest."""
    for layer in small_chain.layers.values():
        quantizer = layer.weight_quantizer
        quantizer.set_codes(quantizer.nearest_codes(layer.weight), quantizer.scale)
    return small_chain


def module_for(chain: Chain, **settings: Any) -> NetworkTuning:
    return NetworkTuning(chain, replace(SPEC, **settings), 10)


def learned(chain: Chain) -> set[str]:
    return {name for name, parameter in chain.network.named_parameters() if parameter.requires_grad}


def data_for(chain: Chain, samples: Tensor, with_features: bool = False) -> NetworkData:
    switch(chain.layers.values(), "off", activations=False)
    budget = MemoryBudget(2**30)
    inputs = fill(budget, len(samples), samples.split(16), lambda x: x)
    outputs = fill(budget, len(samples), inputs.batches(16), chain.network)
    features = None
    if with_features:
        features = fill(budget, len(samples), inputs.batches(16), lambda x: read_by_the_head(chain, x))
    switch(chain.layers.values(), "hard", activations=True)
    return NetworkData(inputs, inputs, outputs, features=features)


@torch.no_grad()
def read_by_the_head(chain: Chain, x: Tensor) -> Tensor:
    """Give what the last block of the small network makes, without the chain."""
    found: list[Tensor] = []
    handle = chain.network.get_submodule("blocks.2").register_forward_hook(lambda module, args, y: found.append(y))
    chain.network(x)
    handle.remove()
    return found[0]


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().softmax(1), q.double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def test_it_learns_scales_and_biases_of_all_layers_and_no_weight(hard_chain: Chain) -> None:
    module = module_for(hard_chain)
    kinds = ("weight_quantizer.log_factor", "input_quantizer.scale", "layer.bias")
    assert learned(hard_chain) == {f"{path}.{kind}" for path in hard_chain.layers for kind in kinds}
    seen_by_lightning = {id(parameter) for parameter in module.parameters()}
    assert all(id(p) in seen_by_lightning for p in hard_chain.network.parameters() if p.requires_grad)
    module.end(module.learned())
    assert not learned(hard_chain)


@pytest.mark.parametrize(
    ("rate", "kind"),
    [
        ("weight_scale_lr", "weight_quantizer.log_factor"),
        ("activation_scale_lr", "input_quantizer.scale"),
        ("bias_lr", "layer.bias"),
    ],
)
def test_a_rate_of_zero_learns_nothing_of_its_kind(hard_chain: Chain, rate: str, kind: str) -> None:
    hard_chain.layers["stem"].input_quantizer.bits = None
    module = module_for(hard_chain, **{rate: 0.0})
    assert not any(name.endswith(kind) for name in learned(hard_chain))
    assert "stem.input_quantizer.scale" not in learned(hard_chain), "it quantizes nothing"
    count = len(module.configure_optimizers()["optimizer"].param_groups)  # type: ignore[index,call-overload]
    assert count == len(learned(hard_chain))


def test_rates_are_relative_and_fall_as_a_cosine(hard_chain: Chain) -> None:
    module = module_for(hard_chain)
    found: Any = module.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert found["lr_scheduler"]["interval"] == "step"
    layer = hard_chain.layers["blocks.1.conv2"]
    assert layer.bias is not None
    expected = {
        id(layer.weight_quantizer.log_factor): 1e-3,
        id(layer.input_quantizer.scale): 2e-3 * layer.input_quantizer.scale.item(),
        id(layer.bias): 3e-3 * math.sqrt(sum(b * b for b in layer.bias.tolist()) / len(layer.bias)),
    }

    def rates() -> dict[int, float]:
        rates = {id(group["params"][0]): group["lr"] for group in optimizer.param_groups}
        return {key: rates[key] for key in expected}

    assert rates() == pytest.approx(expected)
    for step in range(1, 11):
        optimizer.step()
        scheduler.step()
        assert rates() == pytest.approx(
            {key: value * (1 + math.cos(math.pi * step / 10)) / 2 for key, value in expected.items()},
            rel=1e-6,
            abs=1e-12,
        )


@pytest.mark.parametrize("first_drop", [0.3, 0.01])
def test_limited_rates_promise_a_share_of_the_loss(hard_chain: Chain, samples: Tensor, first_drop: float) -> None:
    """The promise is that of the step which Adam makes: what it moves, times the gradient."""
    data = data_for(hard_chain, samples)
    module = module_for(hard_chain, weight_scale_lr=0.2, first_drop=first_drop)
    batch = data.rows(torch.arange(16))
    module.limit_rates([batch])
    assert 0 < module.rate_share < 1
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index]
    variables = [group["params"][0] for group in optimizer.param_groups]
    before = [variable.detach().clone() for variable in variables]
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    optimizer.step()
    pairs = zip(variables, before, strict=True)
    promise = sum(((old - new.detach()) * new.grad).sum().item() for new, old in pairs if new.grad is not None)
    assert promise == pytest.approx(first_drop * loss.item(), rel=1e-2)


def test_rates_that_promise_little_stay(hard_chain: Chain, samples: Tensor) -> None:
    batch = data_for(hard_chain, samples).rows(torch.arange(16))
    for settings in ({"first_drop": None, "weight_scale_lr": 0.2}, {"first_drop": 1e6}):
        module = module_for(hard_chain, **settings)
        module.limit_rates([batch])
        assert module.rate_share == 1


def test_losses_and_promises_are_summed_over_batches_and_processes(
    hard_chain: Chain, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_for(hard_chain, samples)
    seen: list[Tensor] = []
    monkeypatch.setattr(tuning, "all_reduce", lambda sums: seen.append(sums) or sums * torch.tensor([1, 3]))
    batches = [data.rows(torch.arange(16)), data.rows(torch.arange(16, 48))]
    shares = []
    for part in (batches[:1], batches[1:], batches):
        module = module_for(hard_chain, weight_scale_lr=0.2, first_drop=0.01)
        module.limit_rates(part)
        shares.append(module.rate_share)
    torch.testing.assert_close(seen[0] + seen[1], seen[2])
    assert shares == pytest.approx([0.01 * loss / (3 * promise) for loss, promise in torch.stack(seen).tolist()])


@pytest.mark.parametrize("power", [0.0, 2.0, 4.0])
def test_rates_of_weights_and_biases_fall_with_bits(hard_chain: Chain, power: float) -> None:
    spec = replace(SPEC, rate_power=power)
    found = {}
    for bits in (3, 4):
        groups = NetworkTuning(hard_chain, spec, 10, bits).configure_optimizers()["optimizer"].param_groups  # type: ignore[index,call-overload]
        found[bits] = [group["initial_lr"] for group in groups]
    layers, quantizers = len(hard_chain.layers), len({id(each) for each in hard_chain.quantizers.values()})
    factors = [four / three for three, four in zip(found[3], found[4], strict=True)]
    assert factors[-quantizers:] == [1] * quantizers, "activation scales come last"
    assert factors[:-quantizers] == pytest.approx([(7 / 15) ** power] * 2 * layers)


def test_shared_variables_are_optimised_once(hard_chain: Chain) -> None:
    layers = list(hard_chain.layers.values())
    layers[2].input_quantizer = layers[1].input_quantizer
    groups = module_for(hard_chain).configure_optimizers()["optimizer"].param_groups  # type: ignore[index,call-overload]
    assert len(groups) == len({id(group["params"][0]) for group in groups}) == 3 * len(layers) - 1


def test_divergence_and_loss_by_hand(hard_chain: Chain, samples: Tensor) -> None:
    data = data_for(hard_chain, samples)
    module = module_for(hard_chain)
    with torch.no_grad():
        low = hard_chain.network(samples)
    for count in (1, 40, 64):
        expected = kl(data.target.tensor[:count], low[:count])
        found = module.divergences(data, torch.arange(count))
        assert found.shape == (count,)
        assert found.mean().item() == pytest.approx(expected, rel=1e-5)
    rows = data.rows(slice(5, 21))
    found = module.training_step(rows, 0)
    assert found["loss"].item() == pytest.approx(kl(data.target.tensor[5:21], low[5:21]), rel=1e-3)
    assert found["divergence"] == found["loss"].detach()
    found["loss"].backward()
    for name, parameter in hard_chain.network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.grad is not None and name.endswith(("log_factor", "bias")):
            assert parameter.grad.abs().sum() > 0, name


def test_average_over_views_by_hand() -> None:
    views = [[[2.0, 0.0, -1.0], [100.0, 0.0, -100.0]], [[0.0, 1.0, 1.0], [100.0, 0.0, -100.0]]]  # of two samples
    found = averaged_over_views(torch.tensor(views).flatten(0, 1), 2)
    assert torch.equal(found[:2], found[2:]), "the same for every view"
    for sample, mean in enumerate(found[:2].exp()):
        powers = [[math.exp(value - max(view[sample])) for value in view[sample]] for view in views]
        expected = [sum(each[k] / sum(each) for each in powers) / 2 for k in range(3)]
        assert mean.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    assert found.isfinite().all()
    assert torch.equal(averaged_over_views(found, 1).argmax(1), found.argmax(1))


def test_what_is_wanted_is_fitted_and_judges(hard_chain: Chain, samples: Tensor) -> None:
    data = data_for(hard_chain, samples)
    wanted = fill(MemoryBudget(2**30), len(samples), data.target.tensor.flip(0).split(16), lambda x: x)
    other = replace(data, wanted=wanted)
    assert torch.equal(other.rows(slice(3, 9))[2], data.target.tensor.flip(0)[3:9])
    module, rows = module_for(hard_chain), torch.arange(3, 30)
    turned = replace(data, target=wanted)
    assert torch.equal(module.divergences(other, rows), module.divergences(turned, rows))
    assert not torch.equal(module.divergences(other, rows), module.divergences(data, rows))


@pytest.mark.parametrize("weight", [0.5, 10.0])
def test_loss_with_features_by_hand(hard_chain: Chain, samples: Tensor, weight: float) -> None:
    data = data_for(hard_chain, samples, with_features=True)
    module = module_for(hard_chain, feature_weight=weight)
    rows = data.rows(slice(5, 21))
    full, low = rows[3], read_by_the_head(hard_chain, rows[0])
    relative = float(((low - full).double() ** 2).sum() / (full.double() ** 2).sum())
    assert relative > 0
    found = module.training_step(rows, 0)
    divergence = kl(rows[2], hard_chain.network(rows[0]).detach())
    assert found["divergence"].item() == pytest.approx(divergence, rel=1e-3)
    assert found["loss"].item() == pytest.approx(divergence + weight * relative, rel=1e-3)
    assert not found["divergence"].requires_grad


@pytest.mark.parametrize("with_features", [False, True])
def test_gradient_of_a_weight_scale_by_finite_differences(
    hard_chain: Chain, samples: Tensor, with_features: bool
) -> None:
    """With activations unquantized the loss is smooth in the scales and biases."""
    data = data_for(hard_chain, samples, with_features)
    hard_chain.network.double()
    module = module_for(hard_chain, activation_scale_lr=0.0)
    switch(hard_chain.layers.values(), "hard", activations=False)
    batch: Any = tuple(x.double() for x in data.rows(slice(0, 16)))
    module.training_step(batch, 0)["loss"].backward()
    layer = hard_chain.layers["blocks.0.conv2"]
    for variable in (layer.weight_quantizer.log_factor, layer.bias):
        assert variable is not None
        assert variable.grad is not None
        with torch.no_grad():
            losses = []
            for step in (1e-7, -2e-7):
                variable.view(-1)[3] += step
                losses.append(module.training_step(batch, 0)["loss"].item())
        assert variable.grad.view(-1)[3].item() == pytest.approx((losses[0] - losses[1]) / 2e-7, rel=1e-4)


def test_integer_biases_are_learned_too(hard_chain: Chain, samples: Tensor) -> None:
    data = data_for(hard_chain, samples)
    for layer in hard_chain.layers.values():
        layer.integer_bias = True
    module = module_for(hard_chain)
    module.training_step(data.rows(slice(0, 16)), 0)["loss"].backward()
    for layer in hard_chain.layers.values():
        assert layer.bias is not None
        assert layer.bias.grad is not None
        assert layer.bias.grad.abs().sum() > 0
        step = (layer.weight_quantizer.scale.flatten() * layer.input_quantizer.scale).detach()
        codes = layer.rounded_bias(layer.bias).detach() / step
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)


def test_end_keeps_the_scale_that_was_learned(hard_chain: Chain, samples: Tensor) -> None:
    before = {path: layer.weight_quantizer.scale.clone() for path, layer in hard_chain.layers.items()}
    module = module_for(hard_chain)
    with torch.no_grad():
        for layer in module.layers:
            assert layer.weight_quantizer.log_factor is not None
            layer.weight_quantizer.log_factor.fill_(math.log(1.25))
        output = hard_chain.network(samples)
    module.end(module.learned())
    for path, layer in hard_chain.layers.items():
        torch.testing.assert_close(layer.weight_quantizer.scale, 1.25 * before[path])
        assert layer.weight_quantizer.log_factor is None
        assert not layer.weight_quantizer.scale.requires_grad
    assert torch.equal(hard_chain.network(samples), output)


def test_end_keeps_the_iterate_it_is_given(hard_chain: Chain, samples: Tensor) -> None:
    module = module_for(hard_chain)
    with torch.no_grad():
        outputs = [hard_chain.network(samples)]
        kept = module.learned()
        for parameter in hard_chain.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        outputs.append(hard_chain.network(samples))
    assert not torch.equal(*outputs)
    module.end(kept)
    assert torch.equal(hard_chain.network(samples), outputs[0]), "what was kept does not move with the fit"
    assert not learned(hard_chain)


class Careful(nn.Module):
    """Dropout, and a norm that no layer precedes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.stem, self.drop = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1), nn.Dropout(0.5)
        self.middle, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.drop(self.stem(self.norm(x)).relu())).relu().mean((2, 3)))


def test_everything_stays_in_evaluation_mode(samples: Tensor) -> None:
    chain = prepare(Careful().train(), samples[:4]).chain
    for layer in chain.layers.values():
        layer.weight_quantizer.codes = torch.zeros(layer.weight.shape, dtype=torch.uint8)
    module = module_for(chain).train()
    assert not any(each.training for each in (*module.modules(), *chain.network.modules()))


def test_rows_are_fresh_and_close_gives_memory_back(hard_chain: Chain, samples: Tensor) -> None:
    data = data_for(hard_chain, samples, with_features=True)
    index = torch.tensor([9, 0, 9])
    x, again, target, features = data.rows(index)
    assert x is again
    assert torch.equal(x, samples[index])
    assert torch.equal(target, data.target.tensor[index])
    assert data.features is not None
    assert torch.equal(features, data.features.tensor[index])
    budget = data.target.budget
    assert budget.used == samples.nbytes + 64 * 5 * 4 + data.features.tensor.nbytes
    data.close()
    assert budget.used == 0
    assert len(data.full_input) == len(data.target) == 0


def test_biases_alone_where_there_are_none_are_refused(hard_chain: Chain) -> None:
    alone = TuningSpec(steps=5, weight_scale_lr=0, activation_scale_lr=0)
    check_tuning(hard_chain, Recipe(tuning=alone), 2)
    for layer in hard_chain.layers.values():
        layer.layer.bias = None
    with pytest.raises(UserError, match=r"recipe\.tuning\.bias_lr is 0\.01; allowed: .*no quantized layer has a bias"):
        check_tuning(hard_chain, Recipe(tuning=alone), 2)
    check_tuning(hard_chain, Recipe(tuning=replace(alone, steps=0)), 2)
    check_tuning(hard_chain, Recipe(tuning=TuningSpec(steps=5)), 2)
    module = module_for(hard_chain)
    assert not any("bias" in name for name in learned(hard_chain))
    module.end(module.learned())


@pytest.mark.parametrize("count", [0, 1])
def test_a_sample_must_be_left_beside_the_one_held_out(hard_chain: Chain, count: int) -> None:
    with pytest.raises(UserError, match=r"recipe\.tuning\.steps is 1000; allowed: 0 with fewer than 2 calibration"):
        check_tuning(hard_chain, Recipe(), count)
    check_tuning(hard_chain, Recipe(tuning=TuningSpec(steps=0)), count)
