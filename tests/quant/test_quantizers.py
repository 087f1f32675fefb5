"""The quantizers of a layer: modes of the weight, QDrop and learned scales of the input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack_ptq.quant.affine import affine_parameters, fake_quantize
from pack_ptq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from pack_ptq.quant.row_observer import RowObserver
from pack_ptq.types import KINDS, ActivationKind, QuantizerSpec

SEEDS = st.integers(0, 2**31)
SHAPES = st.sampled_from([(6, 4, 3, 3), (5, 7), (4, 1, 3), (3, 2, 2, 2, 2)])


def weights(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def weight_quantizer(
    w: torch.Tensor,
    bits: int = 3,
    observer: str = "mse",
    symmetric: bool = False,
    axis: int = 0,
    per_channel: bool = True,
) -> WeightQuantizer:
    quantizer = WeightQuantizer(axis)
    quantizer.set_range(w, QuantizerSpec(bits, observer, 99.0, per_channel), symmetric)
    return quantizer


def input_quantizer(
    x: torch.Tensor, bits: int | None = 4, observer: str = "minmax", rows: RowObserver | None = None
) -> ActivationQuantizer:
    quantizer = ActivationQuantizer()
    quantizer.rows = rows
    for watching in ("extremes", "values", None):
        quantizer.watching = watching
        assert quantizer(x) is x
    quantizer.set_range(None if bits is None else QuantizerSpec(bits, observer, per_channel=False))
    quantizer.enabled = True
    return quantizer


class TestWeights:
    def test_off_hands_the_weight_through(self) -> None:
        w = weights(0, (4, 4))
        assert weight_quantizer(w)(w) is w

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_nearest_is_torchs_fake_quantize_along_the_axis(self, axis: int, symmetric: bool) -> None:
        w = weights(1, (4, 6, 3, 3))
        quantizer = weight_quantizer(w, axis=axis, symmetric=symmetric)
        quantizer.mode = "nearest"
        expected = torch.fake_quantize_per_channel_affine(
            w, quantizer.scale.flatten(), quantizer.zero_point.flatten().int(), axis, *quantizer.limits
        )
        assert quantizer.scale.numel() == w.shape[axis]
        assert torch.allclose(quantizer(w), expected, atol=1e-6)

    def test_per_tensor_has_one_scale(self) -> None:
        w = weights(2, (4, 6, 3, 3))
        quantizer = weight_quantizer(w, per_channel=False)
        assert quantizer.scale.shape == (1, 1, 1, 1)
        quantizer.mode = "nearest"
        expected = torch.fake_quantize_per_tensor_affine(
            w, quantizer.scale.squeeze(), quantizer.zero_point.squeeze().int(), *quantizer.limits
        )
        assert torch.allclose(quantizer(w), expected, atol=1e-6)

    @given(SEEDS, SHAPES, st.integers(2, 8), st.booleans(), st.sampled_from(["minmax", "percentile", "mse"]))
    def test_soft_start_is_the_weight_itself_where_not_clipped(
        self, seed: int, shape: tuple[int, ...], bits: int, symmetric: bool, observer: str
    ) -> None:
        w = weights(seed, shape)
        quantizer = weight_quantizer(w, bits, observer, symmetric)
        quantizer.begin_fit(w, learn_scale=False)
        smallest, largest = quantizer.limits
        low = (smallest - quantizer.zero_point) * quantizer.scale
        high = (largest - quantizer.zero_point) * quantizer.scale
        assert torch.allclose(quantizer(w), torch.clamp(w, low, high), atol=1e-5)

    @given(SEEDS, SHAPES, st.integers(2, 8), st.booleans())
    def test_hard_codes_start_at_nearest_and_are_integers_in_range(
        self, seed: int, shape: tuple[int, ...], bits: int, symmetric: bool
    ) -> None:
        w = weights(seed, shape)
        quantizer = weight_quantizer(w, bits, symmetric=symmetric)
        quantizer.begin_fit(w, learn_scale=True)
        codes, scale = quantizer.hardened()
        tie = ((w / quantizer.scale).frac().abs() - 0.5).abs() < 1e-4
        assert torch.equal(codes[~tie], quantizer.nearest_codes(w)[~tie])
        assert torch.equal(scale, quantizer.scale)
        assert torch.equal(codes, codes.round())
        assert quantizer.limits[0] <= codes.min() <= codes.max() <= quantizer.limits[1]

    @given(SEEDS, st.integers(2, 8), st.booleans())
    def test_hardened_codes_stay_in_range_wherever_the_fit_goes(self, seed: int, bits: int, symmetric: bool) -> None:
        w = weights(seed, (5, 9))
        quantizer = weight_quantizer(w, bits, symmetric=symmetric)
        quantizer.begin_fit(w, learn_scale=True)
        quantizer.rounding.data = weights(seed + 1, (5, 9)) * 100
        quantizer.log_factor.data = weights(seed + 2, (5, 1))
        quantizer.mode = "settled"
        settled = quantizer(w)
        codes, scale = quantizer.hardened()
        floor = torch.floor(w / quantizer.scale) + quantizer.zero_point
        assert ((codes == floor.clamp(*quantizer.limits)) | (codes == (floor + 1).clamp(*quantizer.limits))).all()
        assert torch.equal(scale, quantizer.learned_scale())
        quantizer.end_fit()
        quantizer.set_codes(codes, scale)
        assert quantizer.codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert torch.equal(quantizer.codes.float(), codes)
        assert torch.equal(quantizer(w), settled)
        assert torch.allclose(quantizer(w), (codes - quantizer.zero_point) * scale)
        assert not list(quantizer.parameters())

    def test_gradients_of_the_fit_are_true_derivatives(self) -> None:
        w = weights(3, (3, 4)).double()
        quantizer = weight_quantizer(w, bits=4)
        quantizer.begin_fit(w, learn_scale=True)

        def compute(v: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            del quantizer.rounding, quantizer.log_factor
            quantizer.rounding, quantizer.log_factor = v, factor
            return quantizer(w)

        inputs = (quantizer.rounding.detach().requires_grad_(), quantizer.log_factor.detach().requires_grad_())
        assert torch.autograd.gradcheck(compute, inputs)

    def test_deploy_codes_are_symmetric(self) -> None:
        w = weights(4, (8, 9))
        quantizer = weight_quantizer(w, bits=8, symmetric=True)
        assert not quantizer.zero_point.any()
        codes = quantizer.nearest_codes(w)
        assert codes.min() >= -128
        assert codes.max() <= 127
        assert codes.min() < 0

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
    def test_dead_channels_survive_the_whole_way(self, symmetric: bool, value: float) -> None:
        w = weights(5, (3, 8))
        w[1] = value
        quantizer = weight_quantizer(w, symmetric=symmetric)
        quantizer.mode = "nearest"
        assert torch.allclose(quantizer(w)[1], w[1])
        quantizer.begin_fit(w, learn_scale=True)
        loss = quantizer(w).square().sum()
        loss.backward()
        assert torch.isfinite(quantizer.rounding.grad).all()
        assert torch.isfinite(quantizer.log_factor.grad).all()
        quantizer.set_codes(*quantizer.hardened())
        assert torch.allclose(quantizer(w)[1], w[1])

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
    def test_empty_weights(self, shape: tuple[int, ...]) -> None:
        w = torch.zeros(shape)
        quantizer = weight_quantizer(w)
        quantizer.mode = "nearest"
        assert quantizer(w).shape == shape


class TestInputs:
    def test_without_bits_nothing_is_quantized(self) -> None:
        x = torch.randn(20)
        assert input_quantizer(x, bits=None)(x) is x

    @given(SEEDS, st.integers(2, 8))
    def test_values_are_torchs_fake_quantize(self, seed: int, bits: int) -> None:
        x = weights(seed, (4, 30))
        quantizer = input_quantizer(x, bits)
        scale, zero_point = affine_parameters(x.min(), x.max(), bits, symmetric=False)
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), 0, 2**bits - 1)
        sure = ((x / scale).frac().abs() - 0.5).abs() > 1e-3
        assert torch.allclose(quantizer(x)[sure], expected[sure], atol=1e-6)

    def test_learned_scale_gets_a_gradient_and_the_input_too(self) -> None:
        x = torch.randn(50, requires_grad=True)
        quantizer = input_quantizer(x)
        quantizer.scale.requires_grad_(True)
        quantizer(x).square().sum().backward()
        assert quantizer.scale.grad.isfinite()
        assert x.grad.abs().sum() > 0

    def test_qdrop_with_a_generator_is_reproducible(self) -> None:
        x = torch.randn(1000)
        quantizer = input_quantizer(x, bits=2)
        quantizer.drop = 0.5
        runs = []
        for _ in range(2):
            quantizer.generator = torch.Generator().manual_seed(7)
            torch.rand(3)  # the global generator must not matter
            runs.append([quantizer(x), quantizer(x)])
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])
        assert not torch.equal(runs[0][0], runs[0][1]), "drawn anew at each call"
        before = torch.get_rng_state()
        quantizer(x)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("drop", [0.0, 0.25, 0.5, 1.0])
    def test_qdrop_keeps_its_share_and_quantizes_the_rest(self, drop: float) -> None:
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        quantizer = input_quantizer(x, bits=2)
        full = quantizer(x)
        quantizer.drop, quantizer.generator = drop, torch.Generator().manual_seed(1)
        y = quantizer(x)
        assert ((y == x) | (y == full)).all()
        assert (y == x).double().mean().item() == pytest.approx(drop, abs=0.02)

    def test_dropped_elements_pass_their_whole_gradient(self) -> None:
        x = (torch.randn(500) * 10).requires_grad_()
        quantizer = input_quantizer(x.detach() / 10, bits=2)  # most values are clipped
        quantizer.drop, quantizer.generator = 0.5, torch.Generator().manual_seed(1)
        y = quantizer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert (gradient[y == x] == 1).all()
        clipped = fake_quantize(x, quantizer.scale, quantizer.zero_point, (0, 3)).detach()
        low, high = clipped.min(), clipped.max()
        assert (gradient[(y != x) & ((x < low - quantizer.scale) | (x > high + quantizer.scale))] == 0).all()


def probabilities(seed: int) -> torch.Tensor:
    """Give softmax outputs, which crowd near 0."""
    return torch.softmax(20 * weights(seed, (50, 40)), -1)


def of_kind(kind: ActivationKind, bits: int = 3, seed: int = 0) -> ActivationQuantizer:
    quantizer = input_quantizer(probabilities(seed), rows=RowObserver(-1))
    quantizer.set_range(QuantizerSpec(bits, "minmax", per_channel=False), kind)
    assert quantizer.kind == kind
    return quantizer


class TestKinds:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("seed", range(3))
    def test_each_has_few_values_and_the_special_ones_fit_softmax_better_at_four_bits(
        self, bits: int, seed: int
    ) -> None:
        p, error = probabilities(seed), {}
        for kind in KINDS:
            y = of_kind(kind, bits, seed)(p)
            assert len(y.unique()) <= 2**bits or kind == "row_scaled"
            error[kind] = (y - p).square().mean().item()
        assert error["focusing"] < error["uniform"]
        assert error["log_sqrt2"] < error["uniform"] or bits < 4

    def test_focusing_is_uniform_between_its_two_ends(self) -> None:
        p, quantizer = probabilities(0), of_kind("focusing")
        lower, scale = quantizer.lower.item(), quantizer.scale.item()
        assert lower >= 0
        assert lower + 7 * scale <= p.max().item() * (1 + 1e-6)
        levels = lower + scale * torch.arange(8)
        expected = levels[(p[..., None] - levels).abs().argmin(-1)]
        assert torch.allclose(quantizer(p), expected, atol=1e-6)

    def test_log_sqrt2_has_steps_of_half_a_bit_below_its_scale(self) -> None:
        p, quantizer = probabilities(0), of_kind("log_sqrt2")
        assert quantizer.lower.item() == 0
        levels = quantizer.scale.detach() * 2 ** (-0.5 * torch.arange(7))
        y = quantizer(p)
        assert (torch.isclose(y[..., None], levels).any(-1) | (y == 0)).all()
        inside = (p > 1.05 * levels[-1]) & (p < levels[0])
        assert ((y / p).log2()[inside].abs() <= 0.25 + 1e-5).all()

    def test_log_sqrt2_counts_from_the_lowest_value_below_zero(self) -> None:
        x = torch.nn.functional.gelu(torch.linspace(-3, 3, 2000))
        quantizer = input_quantizer(x)
        quantizer.set_range(QuantizerSpec(4, per_channel=False), "log_sqrt2")
        assert quantizer.lower.item() == pytest.approx(x.min().item())
        assert quantizer(x).min().item() == pytest.approx(x.min().item())

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_what_the_kind_uses_is_learned(self, kind: ActivationKind) -> None:
        p, quantizer = probabilities(0), of_kind(kind)
        quantizer.learn(True)
        quantizer(p).square().sum().backward()
        assert quantizer.scale.grad.isfinite()
        assert quantizer.lower.requires_grad == (kind == "focusing") == (quantizer.lower.grad is not None)
        quantizer.learn(False)
        assert not any(parameter.requires_grad for parameter in quantizer.parameters())

    def test_nothing_is_learned_without_bits(self) -> None:
        quantizer = input_quantizer(probabilities(0), bits=None)
        quantizer.learn(True)
        assert not any(parameter.requires_grad for parameter in quantizer.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_was_learned_is_put_back(self, kind: ActivationKind) -> None:
        p, quantizer = probabilities(0), of_kind(kind)
        quantizer.learn(True)
        before, kept = quantizer(p).detach(), quantizer.learned()
        parameters = list(quantizer.parameters())
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        (quantizer(p) - 2 * p).square().sum().backward()
        optimizer.step()
        assert not torch.equal(quantizer(p), before), "the copy has not moved along"
        quantizer.put_learned(kept)
        assert torch.equal(quantizer(p), before)
        assert all(a is b for a, b in zip(quantizer.parameters(), parameters, strict=True))
