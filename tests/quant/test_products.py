"""Products of two activations: off they are the untouched call, on they compute with quantized operands."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pack_ptq.quant.products import QuantizedAttention, QuantizedProduct, run_product
from pack_ptq.quant.quantizers import ActivationQuantizer
from pack_ptq.types import QuantizerSpec

HEADS, QUERIES, KEYS, SIZE = 4, 3, 5, 8
BOOLEAN = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
FLOATS = torch.linspace(-2, 1, QUERIES * KEYS).reshape(QUERIES, KEYS)
# Arguments of attention; the masks in all the shapes that expand to that of the scores.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "boolean": {"attn_mask": BOOLEAN},
    "floats": {"attn_mask": FLOATS},
    "mask of samples": {"attn_mask": torch.stack([BOOLEAN, BOOLEAN.roll(1, 1)])[:, None]},
    "mask of keys": {"attn_mask": BOOLEAN[:1]},
    "mask of heads": {"attn_mask": FLOATS * torch.arange(HEADS)[:, None, None]},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "grouped": {"enable_gqa": True},
    "grouped with a mask": {"enable_gqa": True, "attn_mask": BOOLEAN, "scale": 1.3},
}


def call(arguments: dict[str, Any]) -> Tensor:
    return F.scaled_dot_product_attention(**arguments)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention_arguments(options: dict[str, Any]) -> dict[str, Any]:
    heads = HEADS // 2 if "enable_gqa" in options else HEADS
    shapes = (2, HEADS, QUERIES, SIZE), (2, heads, KEYS, SIZE), (2, heads, KEYS, SIZE)
    return dict(zip(("query", "key", "value"), tensors(*shapes), strict=True)) | options


def calibrate(product: QuantizedProduct, function: Any, arguments: dict[str, Any], bits: int | None) -> None:
    for watching in ("extremes", "values", None):
        for quantizer in product.quantizers.values():
            quantizer.watching = watching
        product.compute(function, arguments)
    for quantizer in product.quantizers.values():
        quantizer.set_range(None if bits is None else QuantizerSpec(bits, "minmax", per_channel=False))
        quantizer.enabled = True


def faked(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    largest = 2**quantizer.bits - 1
    return torch.fake_quantize_per_tensor_affine(x, quantizer.scale.item(), int(quantizer.zero_point), 0, largest)


def attention_by_hand(arguments: dict[str, Any], quantizers: Any) -> Tensor:
    """Head by head, as "Attention Is All You Need" has it, with torch's fake quantization of the four operands."""
    q, k, v = (faked(arguments[name], quantizers[name]) for name in ("query", "key", "value"))
    scale, samples = arguments.get("scale") or 1 / math.sqrt(SIZE), len(q)
    mask = arguments.get("attn_mask", torch.zeros(QUERIES, KEYS)).expand(samples, HEADS, QUERIES, KEYS)
    output = torch.zeros(samples, HEADS, QUERIES, SIZE)
    for sample, head in itertools.product(range(samples), range(HEADS)):
        read = head * k.shape[1] // HEADS
        scores = q[sample, head] @ k[sample, read].T * scale
        allowed = torch.ones(QUERIES, KEYS, dtype=torch.bool)
        if mask.dtype == torch.bool:
            allowed = mask[sample, head]
        else:
            scores = scores + mask[sample, head]
        if arguments.get("is_causal"):
            allowed = torch.arange(QUERIES)[:, None] >= torch.arange(KEYS)
        weights = scores.exp() * allowed
        probabilities = faked(weights / weights.sum(1, keepdim=True), quantizers["probabilities"])
        output[sample, head] = probabilities @ v[sample, read]
    return output


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
class TestAttention:
    def test_off_is_the_untouched_call(self, options: dict[str, Any]) -> None:
        arguments = attention_arguments(options)
        assert torch.equal(QuantizedAttention().compute(call, arguments), call(arguments))

    def test_watched_is_the_call_up_to_rounding(self, options: dict[str, Any]) -> None:
        product, arguments = QuantizedAttention(), attention_arguments(options)
        for quantizer in product.quantizers.values():
            quantizer.watching = "extremes"
        assert torch.allclose(product.compute(call, arguments), call(arguments), atol=1e-5)
        assert all(quantizer.observer.low < quantizer.observer.high for quantizer in product.quantizers.values())
        assert product.quantizers["probabilities"].observer.low >= 0
        assert product.quantizers["probabilities"].observer.high <= 1

    @pytest.mark.parametrize("bits", [3, 8])
    def test_on_is_attention_by_hand_with_torchs_fake_quantized_operands(
        self, options: dict[str, Any], bits: int
    ) -> None:
        product, arguments = QuantizedAttention(), attention_arguments(options)
        calibrate(product, call, arguments, bits)
        output = product.compute(call, arguments)
        assert torch.allclose(output, attention_by_hand(arguments, product.quantizers), atol=1e-5)
        assert not torch.allclose(output, call(arguments), atol=1e-5)

    def test_without_bits_it_is_the_untouched_call(self, options: dict[str, Any]) -> None:
        product, arguments = QuantizedAttention(), attention_arguments(options)
        calibrate(product, call, arguments, None)
        assert torch.equal(product.compute(call, arguments), call(arguments))


def test_a_query_that_may_read_no_key_gets_what_torch_gives() -> None:
    arguments = attention_arguments({"attn_mask": BOOLEAN & torch.tensor([[True], [False], [True]])})
    product = QuantizedAttention()
    product.quantizers["query"].watching = "extremes"
    assert torch.allclose(product.compute(call, arguments), call(arguments), atol=1e-5)


@pytest.mark.parametrize("operand", ["query", "key", "probabilities", "value"])
def test_one_operand_of_attention_is_quantized_alone(operand: str) -> None:
    product, arguments = QuantizedAttention(), attention_arguments({})
    calibrate(product, call, arguments, 2)
    for name, quantizer in product.quantizers.items():
        quantizer.enabled = name == operand
    output = product.compute(call, arguments)
    if operand == "probabilities":
        p = F.softmax(arguments["query"] @ arguments["key"].mT / math.sqrt(SIZE), -1)
        expected = faked(p, product.quantizers[operand]) @ arguments["value"]
    else:
        expected = call({**arguments, operand: faked(arguments[operand], product.quantizers[operand])})
    assert torch.allclose(output, expected, atol=1e-5)


PRODUCTS = {
    "matmul": (torch.matmul, (2, 4, 5), (2, 5, 6)),
    "matmul of heads": (torch.matmul, (2, 3, 4, 5), (2, 3, 5, 6)),
    "shared heads": (torch.matmul, (2, 3, 4, 5), (2, 1, 5, 6)),
    "bmm": (torch.bmm, (6, 4, 5), (6, 5, 7)),
    "einsum": (lambda input, other: torch.einsum("bnhd,bmhd->bhnm", input, other), (2, 4, 3, 5), (2, 6, 3, 5)),
}


@pytest.mark.parametrize(("function", "left", "right"), PRODUCTS.values(), ids=PRODUCTS)
class TestProduct:
    def test_off_and_without_bits_it_is_the_untouched_call(self, function: Any, left: Any, right: Any) -> None:
        x, y = tensors(left, right)
        product, arguments = QuantizedProduct(("input", "other")), {"input": x, "other": y}
        for _ in range(2):
            output = product.compute(lambda a: function(a["input"], a["other"]), arguments)
            assert torch.equal(output, function(x, y))
            handed_on = product.compute(lambda a: a, arguments)
            assert handed_on["input"] is x
            assert handed_on["other"] is y
            calibrate(product, lambda a: a["input"], arguments, None)

    def test_on_it_multiplies_torchs_fake_quantized_operands(self, function: Any, left: Any, right: Any) -> None:
        x, y = tensors(left, right)
        product, arguments = QuantizedProduct(("input", "other")), {"input": x, "other": y}
        calibrate(product, lambda a: function(a["input"], a["other"]), arguments, 3)
        output = product.compute(lambda a: function(a["input"], a["other"]), arguments)
        expected = function(*(faked(arguments[name], product.quantizers[name]) for name in arguments))
        assert torch.allclose(output, expected, atol=1e-5)
        assert not torch.allclose(output, function(x, y), atol=1e-2)


def test_other_arguments_are_handed_on() -> None:
    added, x, y = tensors((2, 4, 6), (2, 4, 5), (2, 5, 6))
    product = QuantizedProduct(("input", "other"))
    arguments = {"added": added, "input": x, "other": y, "beta": 0.5, "alpha": 2.0}

    def function(a: dict[str, Any]) -> Tensor:
        return torch.baddbmm(a["added"], a["input"], a["other"], beta=a["beta"], alpha=a["alpha"])

    calibrate(product, function, arguments, 4)
    expected = 0.5 * added + 2 * faked(x, product.quantizers["input"]) @ faked(y, product.quantizers["other"])
    assert torch.allclose(product.compute(function, arguments), expected, atol=1e-5)


class TestCounts:
    """Of one sample, for two samples."""

    @staticmethod
    def counted(product: QuantizedProduct, function: Any, arguments: dict[str, Any]) -> tuple[list[int], int]:
        product.counting = 2
        run_product(product, function, arguments)
        assert list(product.input_elements) == list(product.quantizers)
        return list(product.input_elements.values()), product.macs

    @pytest.mark.parametrize(
        ("function", "left", "right", "elements", "macs"),
        [
            pytest.param(torch.matmul, (2, 4, 5), (2, 5, 6), [20, 30], 4 * 5 * 6, id="matmul"),
            pytest.param(torch.matmul, (2, 3, 4, 5), (2, 3, 5, 6), [60, 90], 3 * 4 * 5 * 6, id="heads"),
            pytest.param(torch.matmul, (2, 7, 3, 4, 5), (2, 7, 3, 5, 6), [420, 630], 7 * 3 * 4 * 5 * 6, id="windows"),
            pytest.param(torch.bmm, (6, 4, 5), (6, 5, 7), [60, 105], 3 * 4 * 5 * 7, id="bmm"),
            pytest.param(torch.matmul, (2, 4, 5), (2, 5, 1), [20, 5], 4 * 5, id="vector"),
            pytest.param(
                lambda x, y: torch.einsum("bnhd,bmhd->bhnm", x, y), (2, 4, 3, 5), (2, 6, 3, 5), [60, 90],
                3 * 4 * 5 * 6, id="einsum",
            ),
            pytest.param(
                torch.matmul, (2, 3, 4, 5), (2, 1, 5, 6), [60, 30], 3 * 4 * 5 * 6, id="shared heads",
            ),
            pytest.param(
                lambda x, y: torch.einsum("bhnm,bmhd->bnhd", x, y), (2, 3, 4, 6), (2, 6, 3, 5), [72, 90],
                3 * 4 * 6 * 5, id="einsum with heads inside",
            ),
        ],
    )  # fmt: skip
    def test_products(self, function: Any, left: Any, right: Any, elements: list[int], macs: int) -> None:
        x, y = tensors(left, right)
        product = QuantizedProduct(("input", "other"))
        given = {"input": x, "other": y}
        assert self.counted(product, lambda a: function(a["input"], a["other"]), given) == (elements, macs)

    def test_convolution_with_a_filter_of_each_sample(self) -> None:
        x, weight = tensors((1, 2 * 4, 6, 6), (2 * 5, 4, 3, 3))
        product = QuantizedProduct(("input", "weight"))
        found = self.counted(product, lambda a: F.conv2d(**a, groups=2), {"input": x, "weight": weight})
        assert found == ([4 * 36, 5 * 4 * 9], 16 * 5 * 4 * 9)

    def test_attention(self) -> None:
        query, key, value = tensors((2, HEADS, QUERIES, SIZE), (2, HEADS, KEYS, SIZE), (2, HEADS, KEYS, 6))
        scores = HEADS * QUERIES * KEYS
        elements, macs = self.counted(QuantizedAttention(), call, {"query": query, "key": key, "value": value})
        assert elements == [HEADS * QUERIES * SIZE, HEADS * KEYS * SIZE, scores, HEADS * KEYS * 6]
        assert macs == scores * SIZE + scores * 6

    def test_grouped_attention_multiplies_for_every_query(self) -> None:
        elements, macs = self.counted(QuantizedAttention(), call, attention_arguments({"enable_gqa": True}))
        scores = HEADS * QUERIES * KEYS
        assert elements == [HEADS * QUERIES * SIZE, HEADS * KEYS * SIZE // 2, scores, HEADS * KEYS * SIZE // 2]
        assert macs == 2 * scores * SIZE

    def test_nothing_is_counted_unasked(self) -> None:
        product = QuantizedAttention()
        run_product(product, call, attention_arguments({}))
        assert product.macs == 0
        assert set(product.input_elements.values()) == {0}
