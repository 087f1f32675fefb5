"""Operations outside of layers: each call site has its quantizers, and nothing else about the network changes."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import swin_transformer as swin

from pack_ptq import layer_sizes, observe, plan_bits, prepare, set_ranges
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.prepare import Prepared
from pack_ptq.graph.switch import quantized, switch
from pack_ptq.graph.trace import arguments_of
from pack_ptq.quant.products import operand_quantizers
from pack_ptq.quant.row_observer import row_shares
from pack_ptq.states import put_ranges_state, put_rest_state, ranges_state, rest_state
from pack_ptq.types import BitPlan, QuantizerSpec, Recipe

TOKENS, WIDTH, HEADS = 6, 8, 2
SCALE = 1 / math.sqrt(WIDTH // HEADS)


def in_batches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * SCALE, -1), v).reshape(shape)


def added_to_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(len(q), TOKENS, TOKENS), q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.baddbmm(q.new_zeros(()), scores.softmax(-1), v).reshape(shape)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhnm,bhmd->bhnd", p, v)


# Of queries, keys and values (batch, heads, tokens, size): the same attention, and the operand that softmax gives.
WAYS: dict[str, tuple[Callable[..., Tensor], str, list[str]]] = {
    "matmul": (
        lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.mT) * SCALE, -1), v),
        "matmul_1.input",
        ["matmul_0", "matmul_1"],
    ),
    "operator": (lambda q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v, "matmul_1.input", ["matmul_0", "matmul_1"]),
    "rmatmul": (
        lambda q, k, v: v.__rmatmul__(F.softmax(k.mT.__rmatmul__(q) * SCALE, -1)),
        "rmatmul_1.other",
        ["rmatmul_0", "rmatmul_1"],
    ),
    "bmm": (in_batches, "bmm_1.input", ["bmm_0", "bmm_1"]),
    "baddbmm": (added_to_nothing, "baddbmm_1.input", ["baddbmm_0", "baddbmm_1"]),
    "einsum": (by_einsum, "einsum_1.input", ["einsum_0", "einsum_1"]),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        "attention_0.probabilities",
        ["attention_0"],
    ),
}


class Attention(nn.Module):
    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way, self.qkv, self.out = way, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.way(q, k, v).transpose(1, 2).flatten(2))


class TwiceAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x).relu())


class Functional(nn.Module):
    """A linear layer in a form of its own, with the numbers of an `nn.Linear`."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute, fc = compute, nn.Linear(WIDTH, WIDTH)
        self.weight, self.bias = nn.Parameter(fc.weight.detach()), nn.Parameter(fc.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Owned(nn.Module):
    """As torchvision's Swin has its `qkv`: a layer that is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = standardised(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class By(nn.Module):
    """Computes what it is told, with parts that are given by name."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Weights(nn.Module):
    """Parameters without a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())


class AsImage(nn.Module):
    """A convolution of tokens that lie 2 x 3."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT.unflatten(2, (2, 3))).flatten(2).mT


class DynamicConv(nn.Module):
    """Each sample has its filter."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Linear(WIDTH, WIDTH * 9)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.filters(x.mean((2, 3))).reshape(-1, 1, 3, 3)
        return F.conv2d(x.flatten(0, 1)[None], weight, padding=1, groups=len(weight)).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Network(nn.Module):
    """For samples of `TOKENS` x 4."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, WIDTH), build(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.stem(x)))).mean(1))


# What is made, the layers and the products that are to be found inside it, and what is left out.
SMALL: dict[str, tuple[Callable[[], nn.Module], list[str], list[str], list[str]]] = {
    **{
        name: (lambda way=way: Attention(way), ["qkv", "out"], products, [])
        for name, (way, _, products) in WAYS.items()
    },
    "shared attention": (
        lambda: TwiceAttention(F.scaled_dot_product_attention), ["qkv", "out"], ["attention_0", "attention_1"], [],
    ),
    "linear": (lambda: Functional(lambda own, x: F.linear(x, own.weight, own.bias)), ["linear_0"], [], []),
    "linear of an owner": (Owned, ["fc"], [], []),
    "right parameter": (lambda: Functional(lambda own, x: x @ own.weight.T + own.bias), ["linear_0"], [], []),
    "left parameter": (lambda: Functional(lambda own, x: (own.weight @ x.mT).mT + own.bias), ["linear_0"], [], []),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), ["linear_0"], [], []),
    "standardised": (
        lambda: AsImage(StandardisedConv(WIDTH, WIDTH, 3, padding=1, groups=2)), ["conv.conv_0"], [], [],
    ),
    "dynamic": (lambda: AsImage(DynamicConv()), ["conv.filters"], ["conv.conv2d_0"], []),
    "recurrent": (Recurrent, [], [], ["rnn (lstm)"]),
}  # fmt: skip
TINY = {"img_size": 32, "num_classes": 5}
LIBRARY: dict[str, Callable[[], nn.Module]] = {
    "timm/vit": lambda: timm.models.VisionTransformer(**TINY, patch_size=8, depth=2, embed_dim=32, num_heads=2),
    "timm/swin": lambda: timm.models.SwinTransformer(
        **TINY, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4)
    ),
    "torchvision/swin": lambda: swin.SwinTransformer(
        [4, 4], 16, [2, 1], [2, 4], [4, 4], num_classes=5, stochastic_depth_prob=0
    ),
    "timm/mixer": lambda: timm.models.MlpMixer(**TINY, patch_size=8, num_blocks=2, embed_dim=32),
    "timm/convnext": lambda: timm.models.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
}
CASES = [*SMALL, *LIBRARY]


def network_of(case: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = (LIBRARY[case]() if case in LIBRARY else Network(SMALL[case][0])).eval()
        for parameter in network.parameters():  # some of the libraries' are 0 or next to it at first
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def samples_of(case: str, count: int) -> Tensor:
    shape = (count, 3, 32, 32) if case in LIBRARY else (count, TOKENS, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(count))


@cache
def prepared(case: str) -> tuple[nn.Module, Prepared]:
    network = network_of(case)
    return network, prepare(network, samples_of(case, 2))


def bit_plan(chain: Chain, bits: int, recipe: Recipe) -> BitPlan:
    links = range(len(chain))
    layers = [list(chain.layers_of(i, i + 1)) for i in links]
    operands = [list(operand_quantizers(chain.products_of(i, i + 1))) for i in links]
    return plan_bits(layers, [(bits, bits)] * len(chain), recipe, operands)


def calibrate(chain: Chain, x: Tensor, bits: int) -> None:
    low = QuantizerSpec(bits), QuantizerSpec(bits, "minmax", per_channel=False)
    recipe = Recipe(*low, protocol="all", bias_correction="none")
    observe(chain, [x])
    set_ranges(chain, bit_plan(chain, bits, recipe), recipe)


@cache
def calibrated(case: str, bits: int) -> Chain:
    chain = prepare(network_of(case), samples_of(case, 2)).chain
    calibrate(chain, samples_of(case, 8), bits)
    return chain


@torch.no_grad()
def quantized_output(chain: Chain, x: Tensor) -> Tensor:
    with quantized(chain.operations, "nearest"):
        return chain.network(x)


@pytest.mark.parametrize("case", SMALL)
def test_every_call_site_is_found_under_its_module(case: str) -> None:
    ready = prepared(case)[1]
    _, layers, products, left_out = SMALL[case]
    assert list(ready.chain.layers) == ["stem", *[f"body.{path}" for path in layers], "head"]
    assert list(ready.chain.products) == [f"body.{path}" for path in products]
    assert list(ready.left_out) == [f"body.{path}" for path in left_out]
    operands = operand_quantizers(ready.chain.products)
    assert all(ready.chain.network.get_submodule(f"body.{path}") is product
               for path, product in zip(products, ready.chain.products.values(), strict=True))  # fmt: skip
    assert len({id(quantizer) for quantizer in operands.values()}) == len(operands), "each has its own"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_off_and_link_by_link_it_is_the_untouched_network(case: str) -> None:
    """At a batch size other than the traced ones."""
    (network, ready), x = prepared(case), samples_of(case, 5)
    chain, expected = ready.chain, network(x)
    assert torch.allclose(chain.network(x), expected, rtol=1e-4, atol=1e-5)
    value = x
    for index in range(len(chain)):
        value = chain.run(value, index, index + 1)
    assert torch.allclose(value, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(chain.run(x), value)


@pytest.mark.parametrize("case", [*WAYS, "linear of an owner", "shared attention"])
@torch.no_grad()
def test_off_it_is_the_very_same_call(case: str) -> None:
    (network, ready), x = prepared(case), samples_of(case, 4)
    assert torch.equal(ready.chain.network(x), network(x))


@pytest.mark.parametrize("case", CASES)
def test_eight_bits_are_near_full_precision_and_not_it(case: str) -> None:
    x = samples_of(case, 8)
    chain = calibrated(case, 8)
    with torch.no_grad():
        expected = chain.network(x)
    error = (quantized_output(chain, x) - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    with torch.no_grad():
        assert torch.equal(chain.network(x), expected), "it is off again"


@pytest.mark.parametrize("case", CASES)
def test_at_two_bits_every_operand_takes_at_most_four_values(case: str) -> None:
    chain = calibrated(case, 2)
    most: dict[int, int] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert output.shape == args[0].shape
        if module.kind == "row_scaled":
            shares = output / row_shares(args[0], module.rows.axis)[1]
            output = (shares / module.scale).round()
            assert torch.allclose(shares, output * module.scale, atol=1e-5)
        most[id(module)] = max(most.get(id(module), 0), len(output.unique()))

    image, *others = chain.quantizers.values()
    assert image.bits is None
    handles = [quantizer.register_forward_hook(look) for quantizer in others]
    quantized_output(chain, samples_of(case, 3))
    for handle in handles:
        handle.remove()
    assert {id(quantizer) for quantizer in others} == set(most)
    assert {4} <= set(most.values()) <= {1, 2, 3, 4}


@pytest.mark.parametrize("case", CASES)
def test_plan_and_sizes_name_every_operand(case: str) -> None:
    chain = prepared(case)[1].chain
    operands = {f"{path}.{name}" for path, product in chain.products.items() for name in product.quantizers}
    plan, sizes = bit_plan(chain, 3, Recipe(protocol="all")), layer_sizes(chain)
    assert set(plan.weight) == set(chain.layers)
    assert set(plan.activation) == set(chain.layers) | operands == set(chain.quantizers) == set(sizes)
    assert all(plan.activation[name] == 3 and sizes[name].inputs > 0 == sizes[name].weights for name in operands)
    assert all(sizes[f"{path}.{next(iter(product.quantizers))}"].macs > 0 for path, product in chain.products.items())


@pytest.mark.parametrize("way", WAYS)
def test_sizes_of_attention_whatever_its_way(way: str) -> None:
    sizes = layer_sizes(prepared(way)[1].chain)
    operands = [size for name, size in sizes.items() if name.removeprefix("body.").split(".")[0] in WAYS[way][2]]
    projected, scores = TOKENS * WIDTH, HEADS * TOKENS**2
    assert sorted(size.inputs for size in operands) == sorted([projected, projected, scores, projected])
    assert sum(size.macs for size in operands) == 2 * HEADS * TOKENS**2 * (WIDTH // HEADS)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_attention_gives_the_same_quantized_output(way: str) -> None:
    x = samples_of(way, 8)
    expected = quantized_output(calibrated("operator", 4), x)
    assert torch.allclose(quantized_output(calibrated(way, 4), x), expected, atol=1e-4)


@pytest.mark.parametrize("case", ["linear", "linear of an owner", "right parameter", "left parameter", "weight norm"])
def test_a_constant_weight_is_quantized_as_that_of_a_called_layer(case: str) -> None:
    network, x = network_of(case), samples_of(case, 8)
    plain, own = nn.Linear(WIDTH, WIDTH), getattr(network.body, "fc", network.body)
    plain.weight.data, plain.bias.data = own.weight.detach(), own.bias.detach()
    network.body = plain
    chain = prepare(network, x).chain
    calibrate(chain, x, 4)
    assert torch.allclose(quantized_output(calibrated(case, 4), x), quantized_output(chain, x), atol=1e-5)


def test_a_standardised_convolution_is_quantized_as_a_plain_one() -> None:
    network, x = network_of("standardised"), samples_of("standardised", 8)
    plain, own = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2), network.body.conv
    plain.weight.data, plain.bias = standardised(own.weight.data), own.bias
    network.body.conv = plain
    chain = prepare(network, x).chain
    calibrate(chain, x, 4)
    assert torch.allclose(
        quantized_output(calibrated("standardised", 4), x), quantized_output(chain, x), rtol=1e-4, atol=1e-4
    )


# Torch's functional convolutions of tokens, in its own argument forms, and the modules they are.
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, 2, 1), lambda c, x: F.conv1d(x, c.weight, c.bias, 2, 1)),
    "named": (
        lambda: nn.Conv1d(8, 6, 3, padding=2, groups=2, dilation=2, bias=False),
        lambda c, x: F.conv1d(input=x, weight=c.weight, padding=2, dilation=2, groups=2),
    ),
    "same": (lambda: nn.Conv1d(8, 6, 3, padding="same"), lambda c, x: F.conv1d(x, c.weight, c.bias, 1, "same")),
    "transposed": (
        lambda: nn.ConvTranspose1d(8, 6, 3, 2, 1, 1, 2),
        lambda c, x: F.conv_transpose1d(x, c.weight, c.bias, 2, 1, 1, 2),
    ),
    "conv2d": (
        lambda: nn.Conv2d(8, 6, (1, 3), (1, 2)),
        lambda c, x: F.conv2d(x, c.weight, c.bias, stride=(1, 2)),
    ),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(8, 6, 2, 2, dilation=2, bias=False),
        lambda c, x: F.conv_transpose2d(x, c.weight, stride=2, dilation=2),
    ),
    "conv3d": (lambda: nn.Conv3d(8, 6, (1, 2, 2)), lambda c, x: F.conv3d(x, c.weight, c.bias)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_functional_convolution_is_quantized_as_the_module(case: str) -> None:
    build, compute = CONVOLUTIONS[case]
    x, outputs = samples_of("", 8), []
    torch.manual_seed(0)
    conv = build()
    shape = {3: (TOKENS,), 4: (2, 3), 5: (1, 2, 3)}[conv.weight.ndim]
    stem, head = nn.Linear(4, WIDTH), nn.Linear(6, 5)

    def run(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return call(x.mT.unflatten(2, shape)).flatten(2).mT

    for body in (
        By(lambda own, x: run(own.conv, x), conv=copy.deepcopy(conv)),
        By(lambda own, x: run(lambda y: compute(own.weights, y), x), weights=Weights(conv)),
    ):
        chain = prepare(nn.Sequential(stem, body, head), x).chain
        assert len(chain.layers) == 3
        calibrate(chain, x, 3)
        outputs.append(quantized_output(chain, x))
    assert torch.allclose(*outputs, atol=1e-5)


class TestRoles:
    @pytest.mark.parametrize("way", WAYS)
    def test_of_attention(self, way: str) -> None:
        roles = {name: quantizer.role for name, quantizer in prepared(way)[1].chain.quantizers.items()}
        assert {name for name, role in roles.items() if role != "any"} == {f"body.{WAYS[way][1]}"}
        assert roles[f"body.{WAYS[way][1]}"] == "softmax"

    class Passing(nn.Module):
        """A layer, and a product, of values that were only moved since they were made."""

        def __init__(self, make: Callable[[Tensor], Tensor], move: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.make, self.move, self.fc, self.drop = make, move, nn.Linear(WIDTH, WIDTH), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            made = self.drop(self.make(x))
            return self.fc(self.move(made, x)) + x @ (self.move(made, x).mT @ x)

    @pytest.mark.parametrize(
        "move",
        [
            pytest.param(lambda y, x: y, id="none"),
            pytest.param(lambda y, x: F.dropout(y.reshape(-1, WIDTH), 0.1, False).view(x.shape), id="reshape"),
            pytest.param(lambda y, x: y.mT.contiguous().mT.clone(), id="transpose"),
            pytest.param(lambda y, x: y.unsqueeze(1).to(x.dtype).squeeze(1).float(), id="to"),
            pytest.param(
                lambda y, x: y.type_as(x), id="type_as",
            ),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize(("role", "make"), [("softmax", lambda x: x.softmax(-1)), ("gelu", nn.GELU())])
    def test_are_found_through_what_hands_values_on(self, role: str, make: Any, move: Any) -> None:
        torch.manual_seed(0)
        chain = prepare(Network(lambda: self.Passing(make, move)), samples_of("", 2)).chain
        roles = {name: quantizer.role for name, quantizer in chain.quantizers.items() if quantizer.role != "any"}
        assert roles == {"body.fc": role, "body.matmul_0.input": role}

    def test_of_the_libraries(self) -> None:
        vit = prepared("timm/vit")[1].chain.quantizers
        assert {name: quantizer.role for name, quantizer in vit.items() if quantizer.role != "any"} == {
            **{f"blocks.{i}.attn.attention_0.probabilities": "softmax" for i in range(2)},
            **{f"blocks.{i}.mlp.fc2": "gelu" for i in range(2)},
        }
        for case, blocks in {"timm/mixer": 4, "timm/convnext": 4, "torchvision/swin": 3, "timm/swin": 3}.items():
            roles = [quantizer.role for quantizer in prepared(case)[1].chain.quantizers.values()]
            assert roles.count("gelu") == blocks
            assert roles.count("softmax") == (3 if "swin" in case else 0)

    def test_hold_only_if_all_calls_share_them(self) -> None:
        computed = {
            "softmax": lambda own, x: own.fc(x.softmax(-1)) + own.fc((x - 3).softmax(-1)),
            "any": lambda own, x: own.fc(x.softmax(-1)) + own.fc(x - 3),
        }
        for role, compute in computed.items():
            chain = prepare_body(compute, fc=nn.Linear(WIDTH, WIDTH)).chain
            quantizer = chain.quantizers["body.fc"]
            assert quantizer.role == role
            calibrate(chain, samples_of("", 4), 8)
            assert quantized_output(chain, samples_of("", 3)).isfinite().all()

    def test_choose_the_kinds_of_codes(self) -> None:
        chain = prepare(network_of("timm/vit"), samples_of("timm/vit", 2)).chain
        recipe = Recipe(post_softmax="log_sqrt2", post_gelu="focusing", protocol="all")
        observe(chain, [samples_of("timm/vit", 4)])
        set_ranges(chain, bit_plan(chain, 4, recipe), recipe)
        kinds = {"softmax": "log_sqrt2", "gelu": "focusing", "any": "uniform"}
        assert all(quantizer.kind == kinds[quantizer.role] for quantizer in chain.quantizers.values())
        assert quantized_output(chain, samples_of("timm/vit", 3)).isfinite().all()


class TestLibraries:
    @pytest.mark.parametrize("case", LIBRARY)
    def test_nothing_is_left_out(self, case: str) -> None:
        assert not prepared(case)[1].left_out

    @pytest.mark.parametrize(("case", "blocks"), [("timm/vit", 2), ("timm/swin", 3), ("torchvision/swin", 3)])
    def test_attention_has_all_its_operands_quantized(self, case: str, blocks: int) -> None:
        """One call for the scores and the mix, or one for each."""
        operands = operand_quantizers(prepared(case)[1].chain.products)
        assert len(operands) == 4 * blocks
        assert all(".attn" in name for name in operands)

    @pytest.mark.parametrize("case", LIBRARY)
    def test_layers_keep_their_names(self, case: str) -> None:
        network, ready = prepared(case)
        layers = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert set(ready.chain.layers) == set(layers)

    def test_swin_v2_leaves_out_only_what_computes_constants(self) -> None:
        parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        network = swin.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5, **parts)
        ready = prepare(network, samples_of("torchvision/swin", 2))
        assert len(ready.chain.products) == 4
        assert all(name.endswith("cpb_mlp.0 (linear of constants)") or "cpb_mlp.2 (" in name for name in ready.left_out)


@pytest.mark.parametrize("case", ["operator", "shared attention", "linear of an owner", "timm/vit", "torchvision/swin"])
class TestCopies:
    def test_a_copy_is_independent(self, case: str) -> None:
        chain, x = calibrated(case, 4), samples_of(case, 3)
        expected = quantized_output(chain, x)
        twin = copy.deepcopy(chain)
        assert torch.equal(quantized_output(twin, x), expected)
        assert not {id(m) for m in chain.network.modules()} & {id(m) for m in twin.network.modules()}
        for quantizer in twin.quantizers.values():
            quantizer.scale.data *= 3
        for parameter in twin.network.parameters():
            parameter.data.mul_(1.5)
        assert torch.equal(quantized_output(chain, x), expected)
        assert not torch.allclose(quantized_output(twin, x), expected)

    def test_quantizers_of_a_copied_network_work(self, case: str) -> None:
        chain, x = calibrated(case, 2), samples_of(case, 3)
        with torch.no_grad(), quantized(chain.operations, "nearest"):
            expected, twin = chain.network(x), copy.deepcopy(chain.network)
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
            assert not torch.allclose(chain.network(x), expected)


@pytest.mark.parametrize("case", ["linear of an owner", "timm/vit", "torchvision/swin"])
def test_it_can_be_pickled(case: str) -> None:
    chain, x = calibrated(case, 2), samples_of(case, 3)
    with torch.no_grad(), quantized(chain.operations, "nearest"):
        assert torch.equal(pickle.loads(pickle.dumps(chain.network))(x), chain.network(x))


def hard_outputs(chain: Chain, other: Chain, x: Tensor) -> list[Tensor]:
    """Give a chain hard codes, another its state, and what both networks give."""
    for layer in chain.layers.values():
        weights = layer.weight_quantizer
        weights.set_codes(weights.nearest_codes(layer.weight), weights.scale)
    put_rest_state(other.network, rest_state(chain))
    put_ranges_state(other, ranges_state(chain))
    outputs = []
    for each in (chain, other):
        switch(each.operations, "hard", activations=True)
        with torch.no_grad():
            outputs.append(each.network(x))
    return outputs


@pytest.mark.parametrize("case", CASES)
def test_states_bring_a_network_with_other_weights_to_the_same_output(case: str) -> None:
    """Hard codes and scales, and the rest in full precision."""
    chain = copy.deepcopy(calibrated(case, 4))
    other = prepare(network_of(case, seed=1), samples_of(case, 2)).chain
    assert torch.equal(*hard_outputs(chain, other, samples_of(case, 4)))
    assert ranges_state(other).keys() == ranges_state(chain).keys()
    assert not any("quantizer" in name for name in rest_state(chain))


SHARED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "one layer under two names": lambda own, x: own.again(torch.relu(own.fc(x))),
    "a weight that a product reads": lambda own, x: own.fc(x) @ own.fc.weight,
    "a weight that an einsum reads": lambda own, x: torch.einsum("bnd,dc->bnc", own.fc(x), own.fc.weight),
    "a transposed weight": lambda own, x: torch.relu(own.fc(x)) * own.fc.weight.T.mean(0),
}


@pytest.mark.parametrize("case", SHARED)
def test_states_have_what_is_shared(case: str) -> None:
    def build(seed: int) -> Chain:
        torch.manual_seed(seed)
        fc = nn.Linear(WIDTH, WIDTH)
        parts = {"fc": fc, "again": fc} if "names" in case else {"fc": fc}
        return prepare_body(SHARED[case], **parts).chain

    chain, other, x = build(0), build(1), samples_of("", 4)
    calibrate(chain, x, 4)
    assert torch.equal(*hard_outputs(chain, other, x))
    # The product has become a layer with codes of its own.
    kept = {"body.fc.layer.weight"} if case in ("a weight that an einsum reads", "a transposed weight") else set()
    assert {name for name in rest_state(chain) if name.endswith(".layer.weight")} == kept


class AttendingSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return torch.softmax(x @ x.mT, -1) @ x


def prepare_body(compute: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> Prepared:
    return prepare(Network(lambda: By(compute, **parts)), samples_of("", 2))


class TestOddCalls:
    def test_an_einsum_of_three_is_left_out(self) -> None:
        ready = prepare_body(lambda own, x: torch.einsum("bnd,bmd,bme->bne", x, x, x))
        assert ready.left_out == ("body (einsum)",)

    def test_an_einsum_of_a_list_is_left_out(self) -> None:
        ready = prepare_body(lambda own, x: torch.einsum("bnd,bmd->bnm", [x, x]) @ x)
        assert ready.left_out == ("body (einsum)",)

    def test_a_bilinear_layer_is_left_out_once(self) -> None:
        ready = prepare_body(lambda own, x: own.fc(x, x), fc=nn.Bilinear(WIDTH, WIDTH, WIDTH))
        assert ready.left_out == ("body.fc (bilinear)",)

    @pytest.mark.parametrize(
        "multiply",
        [torch.linalg.matmul, lambda x, y: torch.tensordot(x, y[0], 1), lambda x, y: torch.inner(x, y[0].mT)],
        ids=["linalg", "tensordot", "inner"],
    )
    def test_other_products_are_left_out(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        ready = prepare_body(lambda own, x: multiply(x, x.mT).mean(-1, keepdim=True) * x)
        assert ready.chain.products or ready.left_out

    def test_operands_by_keyword(self) -> None:
        ready = prepare_body(lambda own, x: torch.bmm(torch.bmm(input=x, mat2=x.mT), mat2=x))
        assert list(ready.chain.products) == ["body.bmm_0", "body.bmm_1"]

    @pytest.mark.parametrize("name", ["input", "self"])
    def test_what_is_added_by_keyword(self, name: str) -> None:
        if name == "self":  # which Python takes as an argument of a method only
            assert arguments_of("baddbmm", (), {"self": 1, "batch1": 2, "batch2": 3}) == {
                "added": 1,
                "input": 2,
                "other": 3,
            }
            return
        ready = prepare_body(lambda own, x: torch.baddbmm(input=x @ x.mT, batch1=x, batch2=x.mT, beta=0.5) @ x)
        assert list(ready.chain.products) == ["body.matmul_0", "body.baddbmm_0", "body.matmul_1"]
        calibrate(ready.chain, samples_of("", 4), 8)
        assert quantized_output(ready.chain, samples_of("", 3)).isfinite().all()

    def test_attention_of_a_subclass_is_left_out(self) -> None:
        class Attending(nn.MultiheadAttention):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x, x, x, need_weights=False)[0]

        ready = prepare_body(lambda own, x: own.a(x), a=Attending(WIDTH, HEADS, batch_first=True))
        assert "body.a (multi_head_attention_forward)" in ready.left_out

    def test_a_convolution_with_a_weight_and_settings_of_its_own(self) -> None:
        def dilated(own: Any, x: Tensor) -> Tensor:
            x = x[:, None]
            outputs = [F.conv2d(x, own.c.weight, own.c.bias, padding=d, dilation=d) for d in (1, 2)]
            return x[:, 0] + (outputs[0] + outputs[1]).mean(1)

        ready = prepare_body(dilated, c=nn.Conv2d(1, 2, 3, padding=1))
        assert not ready.left_out
        used = [layer.layer for path, layer in ready.chain.layers.items() if path.startswith("body")]
        assert [layer.dilation for layer in used] == [(1, 1), (2, 2)]

    def test_a_layer_that_is_never_called_may_lend_its_weight_twice(self) -> None:
        def twice(own: Any, x: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(x, own.fc.weight, own.fc.bias)), own.fc.weight, own.fc.bias)

        chain = prepare_body(twice, fc=nn.Linear(WIDTH, WIDTH)).chain
        assert all(call.layer in chain.layers for call in chain.trace.calls if call.name == "run_quantized")

    def test_a_layer_whose_bias_is_changed_is_not_left_out(self) -> None:
        """As in torchvision's Swin V2."""
        ready = prepare_body(lambda own, x: F.linear(x, own.fc.weight, own.fc.bias.clone()), fc=nn.Linear(WIDTH, WIDTH))
        assert not ready.left_out

    def test_a_container_that_computes_products(self) -> None:
        network = nn.Sequential(nn.Linear(4, WIDTH), AttendingSequential(nn.Linear(WIDTH, WIDTH)))
        ready = prepare(network, samples_of("", 2))
        assert not ready.chain.products
        assert ready.left_out == ("1 (matmul)", "1 (matmul)"), "a child would become a layer of the container"

    @pytest.mark.parametrize(
        "compute",
        [
            pytest.param(lambda own, x: x * F.linear(x, own.fc.weight[0])[..., None], id="weight"),
            pytest.param(lambda own, x: x + own.fc.weight @ x[0, 0], id="input"),
        ],
    )
    def test_a_single_vector(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        assert prepare_body(compute, fc=nn.Linear(WIDTH, WIDTH)).chain.layers

    def test_a_constant_product_needs_no_quantizer(self) -> None:
        chain = prepare_body(lambda own, x: x * (own.fc.weight @ own.fc.weight.T).mean(0) @ x.mT @ x,
                             fc=nn.Linear(WIDTH, WIDTH)).chain  # fmt: skip
        assert list(chain.products) == ["body.matmul_0", "body.matmul_1"]

    def test_sizes_of_a_product_with_a_constant_batch(self) -> None:
        ready = prepare_body(lambda own, x: x @ own.fc.weight[None].expand(1, -1, -1), fc=nn.Linear(WIDTH, WIDTH))
        sizes = layer_sizes(ready.chain)
        assert sizes["body.matmul_0.input"].macs == TOKENS * WIDTH**2

    def test_the_users_network_is_left_untouched(self) -> None:
        network = network_of("operator")
        modules = dict(network.named_modules())
        prepare(network, samples_of("operator", 2))
        assert dict(network.named_modules()) == modules
        assert "forward" not in vars(network)
