"""The last pass over whole networks: closer to full precision or undone, the same for the same seed, no memory kept."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_helpers import plan_for
from torch import Tensor, nn

from pack_ptq import Hardware, Recipe, Workplace, observe, plan_bits, prepare, set_ranges
from pack_ptq import tune as room
from pack_ptq.cache import MemoryBudget
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import switch
from pack_ptq.held_out import held_out_rows
from pack_ptq.modules import tuning
from pack_ptq.tune import tune
from pack_ptq.types import QuantizerSpec, TuningResult, TuningSpec

PLACE = Workplace(hardware=Hardware("cpu"))
FEATURES = 8 * 6 * 6  # what the head of the small network reads of a sample
SPEC = TuningSpec(
    steps=40, batch_size=16, weight_scale_lr=3e-3, activation_scale_lr=3e-3, bias_lr=3e-3, first_drop=None,
    slow_share=0.0,
)  # fmt: skip


def put_nearest_codes(chain: Chain) -> Chain:
    for layer in chain.layers.values():
        quantizer = layer.weight_quantizer
        quantizer.set_codes(quantizer.nearest_codes(layer.weight), quantizer.scale)
    return chain


@pytest.fixture
def hard_chain(small_chain: Chain) -> Chain:
    """Give the network rounded to nearest."""
    return put_nearest_codes(small_chain)


def with_tuning(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, tuning=replace(SPEC, **settings))


def run(
    chain: Chain, batches: Any, recipe: Recipe, place: Workplace = PLACE, **settings: Any
) -> tuple[Chain, TuningResult]:
    chain = copy.deepcopy(chain)
    return chain, tune(chain, batches, recipe, place, **settings)


def state(chain: Chain) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in chain.network.state_dict().items()}


def changed(a: Chain, b: Chain) -> set[str]:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    return {key for key, value in first.items() if not torch.equal(value, second[key])}


@torch.no_grad()
def divergence(full: Chain, chain: Chain, x: Tensor, *views: Tensor) -> float:
    """Give the KL of a network as it is left, by its definition, from the mean over `x` and further views of it."""
    switch(full.layers.values(), "off", activations=False)
    p = torch.stack([F.softmax(full.network(view).double(), 1) for view in (x, *views)]).mean(0)
    q = F.softmax(chain.network(x).double(), 1)
    return float((p * (p / q).log()).sum(1).mean())


def test_outputs_come_closer_and_codes_stay(
    hard_chain: Chain, batches: list[Tensor], samples: Tensor, small_recipe: Recipe
) -> None:
    chain, result = run(hard_chain, batches, with_tuning(small_recipe))
    assert result.accepted
    assert result.steps == 40
    assert result.after < 0.9 * result.before
    assert result.seconds > 0
    places = held_out_rows(with_tuning(small_recipe), 64, PLACE.seed)
    held_out, seen = samples[places], samples[[place for place in range(64) if place not in places]]
    assert result.after == pytest.approx(divergence(hard_chain, chain, held_out), rel=1e-3)
    switch(hard_chain.layers.values(), "hard", activations=True)
    untuned = copy.deepcopy(hard_chain)
    assert result.before == pytest.approx(divergence(hard_chain, untuned, held_out), rel=1e-3)
    assert divergence(hard_chain, chain, seen) < 0.9 * divergence(hard_chain, untuned, seen)
    kinds = ("weight_quantizer.scale", "input_quantizer.scale", "layer.bias")
    assert changed(hard_chain, chain) <= {f"{path}.{kind}" for path in chain.layers for kind in kinds}
    for layer in chain.layers.values():
        assert (layer.weight_quantizer.scale > 0).all()
        assert (layer.weight_quantizer.mode, layer.input_quantizer.enabled) == ("hard", True)
        assert layer.weight_quantizer.log_factor is None
    assert not any(parameter.requires_grad for parameter in chain.network.parameters())


@pytest.mark.parametrize("rate", ["weight_scale_lr", "activation_scale_lr", "bias_lr"])
def test_each_kind_can_stay(hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe, rate: str) -> None:
    kind = {"weight_scale_lr": "weight_quantizer.scale", "activation_scale_lr": "input_quantizer.scale"}
    chain, result = run(hard_chain, batches, with_tuning(small_recipe, **{rate: 0.0}))
    assert result.accepted
    moved = {name.split(".", name.count(".") - 1)[-1] for name in changed(hard_chain, chain)}
    assert moved == {*kind.values(), "layer.bias"} - {kind.get(rate, "layer.bias")}


@pytest.mark.parametrize("rate", [1.0, 1e3])
def test_rates_beyond_reason_are_lowered(
    hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe, rate: float
) -> None:
    rates = dict.fromkeys(("weight_scale_lr", "activation_scale_lr", "bias_lr"), rate)
    _, result = run(hard_chain, batches, with_tuning(small_recipe, first_drop=0.3, **rates))
    assert result.accepted
    assert result.rate_share < 0.3 / rate
    assert result.after < 0.9 * result.before


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_what_ends_worse_is_undone(hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe, rate: float) -> None:
    """The second rate overflows, so that the divergence is no number."""
    recipe = with_tuning(small_recipe, steps=2, activation_scale_lr=rate, bias_lr=rate)
    chain, result = run(hard_chain, batches, recipe)
    assert not result.accepted
    assert result.after == result.before
    assert not changed(hard_chain, chain)
    assert not any(parameter.requires_grad for parameter in chain.network.parameters())


def test_scales_below_zero_are_undone_whatever_the_divergence(
    hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[Tensor] = []

    def divergences(module: Any, *_: Any) -> Tensor:
        scales.append(torch.stack([layer.input_quantizer.scale.detach().clone() for layer in module.layers]))
        return torch.ones(3).double() / len(scales)

    monkeypatch.setattr(tuning.NetworkTuning, "divergences", divergences)
    chain, result = run(hard_chain, batches, with_tuning(small_recipe, steps=1, activation_scale_lr=2.0))
    assert (scales[1] < 0).any()
    assert not result.accepted
    assert not changed(hard_chain, chain)


def test_same_seed_same_bits_whatever_the_global_generator(
    hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe
) -> None:
    chains = []
    for global_seed, seed in ((0, 4), (1, 4), (0, 5)):
        torch.manual_seed(global_seed)
        chains.append(run(hard_chain, batches, with_tuning(small_recipe, steps=8), replace(PLACE, seed=seed))[0])
    assert not changed(chains[0], chains[1])
    assert changed(chains[0], chains[2])


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[MemoryBudget]:
    """Collects the budgets that are made."""
    made: list[MemoryBudget] = []

    class Watched(MemoryBudget):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)
            self.most = 0

        def allocate(self, count: int, rows: Tensor) -> Any:
            storage = super().allocate(count, rows)
            self.most = max(self.most, self.used)
            return storage

    monkeypatch.setattr(room, "MemoryBudget", Watched)
    return made


def test_views_fill_the_cache_and_leave_nothing(
    hard_chain: Chain, batches: list[Tensor], samples: Tensor, small_recipe: Recipe, budgets: list[Any],
) -> None:  # fmt: skip
    def mirror(x: Tensor, generator: torch.Generator) -> Tensor:
        return x.flip(3) if torch.rand((), generator=generator) < 2 else x

    recipe = with_tuning(small_recipe, steps=12, views=3)
    results = [run(hard_chain, batches, recipe, augment=augment) for augment in (mirror, None)]
    results.append(run(hard_chain, batches, with_tuning(small_recipe, steps=12, feature_weight=0.0)))
    view = samples.nbytes + 64 * 5 * 4
    features = 64 * FEATURES * 4
    averages = 3 * 64 * 5 * 4
    assert [budget.most for budget in budgets] == [3 * (view + features) + averages, view + features, view]
    assert [budget.used for budget in budgets] == [0, 0, 0]
    switch(hard_chain.layers.values(), "hard", activations=True)
    untuned = copy.deepcopy(hard_chain)
    judges = samples[held_out_rows(recipe, 64, PLACE.seed)]
    for (_, result), views in zip(results, ([judges.flip(3)] * 2, [], []), strict=True):
        assert result.before == pytest.approx(divergence(hard_chain, untuned, judges, *views), rel=1e-3)
    assert changed(results[0][0], results[1][0])


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (4, 1), (8, 2), (12, 3), (40, 8), (1000, 8)])
def test_no_more_views_are_made_than_the_steps_use_up(
    steps: int, expected: int, hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Made(BaseException):
        pass

    def outputs(chain: Chain, views: Any, rows: int, *_: Any) -> None:
        assert (views.count, rows) == (expected, 64 * expected)
        raise Made

    monkeypatch.setattr(room, "_outputs", outputs)
    with pytest.raises(Made):
        run(hard_chain, batches, with_tuning(small_recipe, steps=steps), augment=lambda x, generator: x)


@pytest.mark.parametrize("average", [False, True])
def test_views_are_fitted_to_their_mean(
    average: bool, hard_chain: Chain, small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Tensor, ...]] = []
    original = tuning.NetworkTuning.training_step

    def training_step(module: Any, batch: Any, index: int) -> dict[str, Tensor]:
        found.append(batch)
        return original(module, batch, index)

    monkeypatch.setattr(tuning.NetworkTuning, "training_step", training_step)
    full = copy.deepcopy(hard_chain)
    switch(full.layers.values(), "off", activations=False)
    recipe = with_tuning(small_recipe, steps=30, views=3, average_views=average)
    run(hard_chain, marked_samples(21).split(9), recipe, augment=shake)
    x, target = (torch.cat([batch[i] for batch in found]) for i in (1, 2))
    places, own = (x[:, 0, 0, 0] / 10).round(), full.network(x).softmax(1)
    for place in places.unique():
        rows = places == place
        shares = torch.stack([view for view in own[rows].unique(dim=0)])
        assert len(target[rows].unique(dim=0)) == (1 if average else len(shares))
        if average and len(shares) == 3:
            torch.testing.assert_close(target[rows][0].softmax(0), shares.mean(0), rtol=1e-4, atol=1e-6)
        if not average:
            torch.testing.assert_close(target[rows].softmax(1), own[rows], rtol=1e-4, atol=1e-6)


def test_outputs_of_points_are_not_averaged(small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view may have its points or places in another order."""
    torch.manual_seed(0)
    x = torch.randn(16, 5, 3)
    chain = prepare(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), x[:2]).chain
    plan = plan_for(chain, small_recipe)
    observe(chain, [x])
    set_ranges(chain, plan, small_recipe)
    kept: list[Any] = []
    original = room._outputs
    monkeypatch.setattr(room, "_outputs", lambda *args: kept.append(original(*args)) or kept[-1])
    run(put_nearest_codes(chain), [x], with_tuning(small_recipe, steps=20, views=4), augment=shake)
    assert len(kept[0].target.tensor) == 0, "closed"
    assert kept[0].wanted is None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the inputs of every step."""
    found: list[Tensor] = []
    original = tuning.NetworkTuning.training_step

    def training_step(module: Any, batch: Any, index: int) -> dict[str, Tensor]:
        found.append(batch[1].clone())
        return original(module, batch, index)

    monkeypatch.setattr(tuning.NetworkTuning, "training_step", training_step)
    return found


def marked_samples(count: int) -> Tensor:
    """Give samples whose first pixel is 10 times their place, which no change of a view reaches."""
    x = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    x[:, 0, 0, 0] = 10.0 * torch.arange(count)
    return x


def shake(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.5 * torch.rand(x.shape, generator=generator)


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(2, 0.125, 1), (7, 0.125, 1), (21, 0.125, 2), (21, 0.5, 10), (64, 0.125, 8)]
)
def test_held_out_samples_are_never_drawn_in_any_view(
    count: int, share: float, held_out: int, hard_chain: Chain, small_recipe: Recipe, drawn: list[Tensor]
) -> None:
    recipe = with_tuning(small_recipe, steps=30, views=3, held_out=share)
    run(hard_chain, marked_samples(count).split(9), recipe, augment=shake)
    first = torch.cat(drawn)[:, 0, 0, 0]
    places = (first / 10).round()
    left = held_out_rows(recipe, count, PLACE.seed).tolist()
    assert len(left) == held_out
    assert set(places.int().tolist()) == set(range(count)) - set(left)
    own = (first == 10 * places).double().mean().item()
    assert own == pytest.approx(1 / 3, abs=0.15), "a third of the draws is of the samples themselves"


def test_a_single_sample_is_refused(hard_chain: Chain, samples: Tensor, small_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"recipe\.tuning\.steps is 40; allowed: 0 with fewer than 2"):
        run(hard_chain, [samples[:1]], with_tuning(small_recipe))


def scripted(monkeypatch: pytest.MonkeyPatch, divergences: list[float]) -> list[list[tuning.Learned]]:
    """Let the measurements give what is written here, and collect what there was at each."""
    found: list[list[tuning.Learned]] = []
    values: Iterator[float] = iter(divergences)

    def divergences(module: tuning.NetworkTuning, *_: Any) -> Tensor:
        found.append(module.learned())
        return torch.full((3,), next(values), dtype=torch.float64)

    monkeypatch.setattr(tuning.NetworkTuning, "divergences", divergences)
    return found


NAN = float("nan")


@pytest.mark.parametrize(
    ("divergences", "best"),
    [
        ([4.0, 5.0, 2.0, 3.0, 6.0], 2),
        ([4.0, 3.0, 3.0, 2.0, 1.0], 4),
        ([4.0, 4.5, 5.0, NAN, 6.0], 0),
        ([4.0, 4.0, 5.0, NAN, 6.0], 1),
        ([4.0, NAN, NAN, 3.0, 5.0], 3),
        ([NAN, NAN, NAN, NAN, NAN], 0),
    ],
)
def test_the_best_iterate_is_kept(
    divergences: list[float], best: int, hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = scripted(monkeypatch, divergences)
    chain, result = run(hard_chain, batches, with_tuning(small_recipe, steps=8))
    assert len(found) == 1 + SPEC.evaluations
    assert result.accepted == (best > 0)
    assert (result.before, result.after) == pytest.approx((divergences[0], divergences[best]), nan_ok=True)
    weights, activations = found[best]
    quantizers = {id(quantizer): quantizer for quantizer in chain.quantizers.values()}.values()
    for quantizer, learned in zip(quantizers, activations, strict=True):
        assert torch.equal(quantizer.scale, learned["scale"])
    for layer, (scale, bias) in zip(chain.layers.values(), weights, strict=True):
        assert torch.equal(layer.weight_quantizer.scale, scale)
        assert layer.bias is not None
        assert bias is not None
        assert torch.equal(layer.bias, bias)
    assert bool(changed(hard_chain, chain)) == (best > 0)
    assert not any(parameter.requires_grad for parameter in chain.network.parameters())


@pytest.mark.parametrize(
    ("divergences", "share"), [([4.0, 2.0, 3.0], 1), ([4.0, 3.0, 2.0], 0.25), ([1.0, 3.0, 4.0], 0)]
)
def test_held_out_samples_choose_between_a_fast_and_a_slow_pass(
    divergences: list[float], share: float, hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = scripted(monkeypatch, divergences)
    chain, result = run(hard_chain, batches, with_tuning(small_recipe, steps=8, slow_share=0.25, evaluations=1))
    assert (result.accepted, result.steps, result.rate_share) == (share > 0, 16, share or 1)
    assert not any(parameter.requires_grad for parameter in chain.network.parameters())
    assert bool(changed(hard_chain, chain)) == (share > 0)
    monkeypatch.undo()
    for place, factor in ((1, 1), (2, 0.25)):
        rates = {f"{kind}_lr": factor * 3e-3 for kind in ("weight_scale", "activation_scale", "bias")}
        alone, _ = run(hard_chain, batches, with_tuning(small_recipe, steps=8, evaluations=1, **rates))
        assert bool(changed(alone, chain)) == (factor != share), "each pass begins at the same start"
        scales = [layer.weight_quantizer.scale for layer in alone.layers.values()]
        assert all(torch.equal(a, b) for a, (b, _) in zip(scales, found[place][0], strict=True))


def test_memory_mapped_cache_changes_nothing(
    hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe, tmp_path: Any
) -> None:
    recipe = with_tuning(small_recipe, steps=4)
    largest = len(batches[0]) * FEATURES * 4
    small = replace(recipe, reconstruction=replace(recipe.reconstruction, cache_bytes=largest))
    chains = [run(hard_chain, batches, each, replace(PLACE, folder=tmp_path))[0] for each in (recipe, small)]
    assert not changed(*chains)
    assert list(tmp_path.iterdir()) == []


def test_labelled_batches_serve_too(hard_chain: Chain, batches: list[Tensor], small_recipe: Recipe) -> None:
    recipe = with_tuning(small_recipe, steps=4)
    labelled = [(x, torch.zeros(len(x))) for x in batches]
    assert not changed(run(hard_chain, batches, recipe)[0], run(hard_chain, labelled, recipe)[0])


class Careful(nn.Module):
    """Dropout, a norm that no layer precedes, layers without a bias, and scores for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.stem, self.drop = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1, bias=False), nn.Dropout(0.5)
        self.middle, self.head = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 4, 1, bias=False)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training or self.norm.training or self.drop.training)
        return self.head(F.gelu(self.middle(self.drop(F.gelu(self.stem(self.norm(x)))))))


@pytest.mark.parametrize("profile", ["paper", "deploy"])
def test_norms_dropout_and_layers_without_a_bias(samples: Tensor, profile: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Careful()
        network(torch.randn(32, 3, 6, 6) + 1)
    network.modes.clear()
    recipe = Recipe(QuantizerSpec(bits=3), QuantizerSpec(bits=3, per_channel=False), profile=profile, tuning=SPEC)
    chain = prepare(network, samples[:4]).chain
    observe(chain, samples.split(16))
    set_ranges(chain, plan_bits([list(chain.layers)], [(3, 3)], recipe), recipe)
    put_nearest_codes(chain)
    before = copy.deepcopy(chain)
    result = tune(chain, samples.split(16), recipe, PLACE)
    assert result.accepted
    assert result.after < result.before
    assert not any(chain.network.modes), "always in evaluation mode"  # type: ignore[arg-type]
    assert not any("norm" in name for name in changed(before, chain))


def test_integer_biases_stay_multiples_of_the_tuned_scales(
    small_network: nn.Module, batches: list[Tensor], samples: Tensor
) -> None:
    recipe = Recipe(QuantizerSpec(bits=3), QuantizerSpec(bits=4, per_channel=False), profile="deploy", tuning=SPEC)
    chain = prepare(small_network, batches[0]).chain
    observe(chain, batches)
    set_ranges(chain, plan_bits([list(chain.layers)], [(3, 4)], recipe), recipe)
    put_nearest_codes(chain)
    before = {path: layer.bias.clone() for path, layer in chain.layers.items() if layer.bias is not None}
    result = tune(chain, batches, recipe, PLACE)
    assert result.accepted
    assert result.after < result.before
    for path, layer in chain.layers.items():
        assert layer.bias is not None
        assert not torch.equal(layer.bias, before[path]), "the rounding hides no gradient"
        step = (layer.weight_quantizer.scale.flatten() * layer.input_quantizer.scale).double()
        codes = layer.rounded_bias(layer.bias).double() / step
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)
        assert ((layer.rounded_bias(layer.bias) - layer.bias).abs() <= 0.501 * step).all()
    held_out = samples[held_out_rows(recipe, 64, PLACE.seed)]
    assert result.after == pytest.approx(divergence(chain_of(small_network, held_out), chain, held_out), rel=1e-3)


def chain_of(network: nn.Module, samples: Tensor) -> Chain:
    return prepare(network, samples[:4]).chain
