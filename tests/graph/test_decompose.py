"""Taking attention apart: the oracle is the untouched module."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from pack_ptq.errors import UserError
from pack_ptq.graph.decompose import DecomposedAttention, decompose_attention
from pack_ptq.graph.trace import trace_network

SIZE, QUERIES, KEYS, SAMPLES = 8, 3, 5, 2
FUSED_CALLS = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_nested_tensor_from_mask")
PRIMITIVE = {
    *("linear", "softmax", "matmul", "__matmul__", "scaled_dot_product_attention"),
    *("layer_norm", "dropout", "relu", "gelu", "conv2d", "add", "__add__", "mul", "__mul__", "mean"),
    *("chunk", "transpose", "unflatten", "flatten", "reshape", "permute", "expand", "cat", "pad", "__getitem__"),
    *("dim", "size", "__len__", "__get__", "is_floating_point", "zeros_like", "masked_fill", "masked_fill_"),
}


def causal(size: int) -> Tensor:
    """Give a mask that is true where a query may not look."""
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def floats(mask: Tensor) -> Tensor:
    """Give a mask as floats, in part finite ones."""
    return torch.randn(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


@st.composite
def attentions(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, bool]:
    """Draw a module with parameters that matter, and whether it attends to itself."""
    alone = draw(st.booleans())
    options: dict[str, Any] = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn")}
    options |= {} if alone else {name: draw(st.sampled_from([None, 6, SIZE])) for name in ("kdim", "vdim")}
    torch.manual_seed(draw(st.integers(0, 99)))
    heads, batch_first = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    attention = nn.MultiheadAttention(SIZE, heads, dropout=0.1, batch_first=batch_first, **options)
    attention = attention.double().eval()  # for softmax makes much of single precision's rounding
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention, alone


@st.composite
def inputs(draw: st.DrawFn, attention: nn.MultiheadAttention, alone: bool) -> tuple[tuple[Tensor, ...], dict]:
    """Draw query, key and value, and the other arguments of the call."""
    batched, queries = draw(st.booleans()), KEYS if alone else QUERIES
    lead = {n: ((SAMPLES, n) if attention.batch_first else (n, SAMPLES)) if batched else (n,) for n in (queries, KEYS)}
    query = torch.randn(*lead[queries], SIZE, dtype=torch.float64)
    key = query if alone else torch.randn(*lead[KEYS], attention.kdim, dtype=torch.float64)
    shares = alone or (attention.vdim == attention.kdim and draw(st.booleans()))
    value = key if shares else torch.randn(*lead[KEYS], attention.vdim, dtype=torch.float64)
    samples = SAMPLES if batched else 1
    forms = [(queries, KEYS), (samples * attention.num_heads, queries, KEYS)]
    masks = {"attn_mask": draw(st.sampled_from([None, *forms])), "key_padding_mask": draw(st.sampled_from([None, 1]))}
    options: dict[str, Any] = {name: draw(st.booleans()) for name in ("need_weights", "average_attn_weights")}
    if masks["key_padding_mask"] is not None:
        masks["key_padding_mask"] = (SAMPLES, KEYS) if batched else (KEYS,)
    as_floats = draw(st.booleans())
    for name, form in masks.items():
        if form is not None:
            mask = torch.rand(form) < 0.4
            mask[..., 0] = False  # a row of nothing but masked keys is NaN
            options[name] = floats(mask) if as_floats else mask
    if alone and draw(st.booleans()):
        options |= {"attn_mask": causal(KEYS), "is_causal": True}
    return (query, key, value), options


@settings(max_examples=300)
@given(st.data())
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_it_computes_what_the_untouched_module_does(data: st.DataObject) -> None:
    attention, alone = data.draw(attentions())
    tensors, options = data.draw(inputs(attention, alone))
    decomposed = DecomposedAttention(attention, alone and data.draw(st.booleans()))
    with torch.set_grad_enabled(data.draw(st.booleans())):  # without gradients torch may take its fast path
        expected, weights = attention(*tensors, **options)
        output, own_weights = decomposed(*tensors, **options)
    assert output.shape == expected.shape
    assert output.is_contiguous()
    assert torch.allclose(output, expected, atol=1e-9)
    assert (own_weights is None) == (weights is None)
    if weights is not None:
        assert own_weights.shape == weights.shape
        assert torch.allclose(own_weights, weights, atol=1e-9)


def test_fused_attention_also_takes_different_tensors() -> None:
    attention = nn.MultiheadAttention(SIZE, 2).eval()
    query, key, value = torch.randn(3, KEYS, SAMPLES, SIZE)
    output, _ = DecomposedAttention(attention, True)(query, key, value)
    assert torch.allclose(output, attention(query, key, value)[0], atol=1e-5)


def test_gradients_are_those_of_the_untouched_module() -> None:
    attention, x = nn.MultiheadAttention(SIZE, 2, batch_first=True), torch.randn(SAMPLES, KEYS, SIZE)
    decomposed = DecomposedAttention(copy.deepcopy(attention), True)
    attention(x, x, x)[0].square().sum().backward()
    decomposed(x, x, x)[0].square().sum().backward()
    assert torch.allclose(decomposed.in_proj.weight.grad, attention.in_proj_weight.grad, atol=1e-5)
    assert torch.allclose(decomposed.out_proj.bias.grad, attention.out_proj.bias.grad, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_drops_in_training_only(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(SIZE, 2, dropout=0.9)
    x = torch.randn(KEYS, SAMPLES, SIZE)
    decomposed = DecomposedAttention(attention, True)
    first, second = (decomposed(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert not DecomposedAttention(attention.eval(), True).training


def test_parameters_are_taken_over_and_no_random_number_is_drawn() -> None:
    attention = nn.MultiheadAttention(SIZE, 2).bfloat16().requires_grad_(False)
    state = torch.get_rng_state()
    fused, split = DecomposedAttention(attention, True), DecomposedAttention(attention, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert fused.in_proj.weight is attention.in_proj_weight
    assert split.out_proj.bias is attention.out_proj.bias
    assert torch.equal(split.k_proj.weight, attention.in_proj_weight[SIZE : 2 * SIZE])
    assert {type(m) for m in (*fused.children(), *split.children())} == {nn.Linear}
    assert not any(p.requires_grad or p.dtype != torch.bfloat16 for p in (*fused.parameters(), *split.parameters()))


def test_causal_without_a_mask_is_refused() -> None:
    attention, x = nn.MultiheadAttention(SIZE, 2).eval(), torch.randn(KEYS, SAMPLES, SIZE)
    with pytest.raises(RuntimeError, match="attn_mask"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(UserError, match="attn_mask"):
        DecomposedAttention(attention, True)(x, x, x, is_causal=True)


class Calls(nn.Module):
    """Call a module on (batch, sequence, features) with fixed arguments."""

    def __init__(self, module: nn.Module, batch_first: bool = True, memory: bool = False, **options: Any) -> None:
        super().__init__()
        self.module, self.batch_first, self.options = module, batch_first, options
        self.memory = torch.randn(1, QUERIES, SIZE) if memory else None

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x] if self.memory is None else [x, self.memory.expand(len(x), -1, -1)]
        if self.batch_first:
            return self.module(*inputs, **self.options)
        return self.module(*(each.transpose(0, 1) for each in inputs), **self.options).transpose(0, 1)


class PadsLast(nn.Module):
    """Hide the last key of every sample from an encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.arange(x.shape[1]).expand(x.shape[:2]) == x.shape[1] - 1
        return self.encoder(x, src_key_padding_mask=hidden)[:, :-1]


class Twice(nn.Module):
    """One attention for two calls, one of which may be on other tensors."""

    def __init__(self, crossed: int | None) -> None:
        super().__init__()
        self.attention, self.crossed = nn.MultiheadAttention(SIZE, 2, batch_first=True), crossed
        self.same = nn.ModuleList([self.attention, self.attention])

    def forward(self, x: Tensor) -> Tensor:
        for number, attention in enumerate(self.same):
            y, weights = attention(x, value=x, key=x.relu() if number == self.crossed else x)
            x = y + weights.mean(-1, keepdim=True)
        return x


def layer(batch_first: bool = True, norm_first: bool = False, bias: bool = True) -> nn.Module:
    """Give an encoder layer that could take the fast path."""
    return nn.TransformerEncoderLayer(SIZE, 2, 16, batch_first=batch_first, norm_first=norm_first, bias=bias)


def decoder(**options: Any) -> nn.Module:
    """Give a decoder layer."""
    return nn.TransformerDecoderLayer(SIZE, 2, 16, **options)


def encoder(**options: Any) -> nn.Module:
    """Give two encoder layers, which could be given nested tensors."""
    return nn.TransformerEncoder(layer(**options), 2, nn.LayerNorm(SIZE))


def vision_transformer() -> nn.Module:
    """Give torchvision's ViT at a small size, with a head that is not zero."""
    network = VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=4)
    nn.init.normal_(network.heads.head.weight)
    return network


NETWORKS: dict[str, Any] = {
    "layer": (lambda: Calls(layer()), ["module.self_attn"]),
    "layer-norm-first": (lambda: Calls(layer(norm_first=True)), ["module.self_attn"]),
    "layer-sequence-first": (lambda: Calls(layer(batch_first=False), batch_first=False), ["module.self_attn"]),
    "layer-both-first": (lambda: Calls(layer(False, True), batch_first=False), ["module.self_attn"]),
    "layer-no-bias": (lambda: Calls(layer(bias=False)), ["module.self_attn"]),
    "encoder": (lambda: Calls(encoder()), ["module.layers.0.self_attn", "module.layers.1.self_attn"]),
    "encoder-norm-first": (
        lambda: Calls(encoder(norm_first=True), mask=causal(KEYS), is_causal=True),
        ["module.layers.0.self_attn", "module.layers.1.self_attn"],
    ),
    "encoder-causal": (
        lambda: Calls(encoder(), mask=causal(KEYS)),
        ["module.layers.0.self_attn", "module.layers.1.self_attn"],
    ),
    "encoder-padded": (lambda: PadsLast(encoder()), ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]),
    "decoder": (lambda: Calls(decoder(batch_first=True), memory=True), ["module.self_attn", "module.multihead_attn"]),
    "decoder-sequence-first": (
        lambda: Calls(decoder(norm_first=True), batch_first=False, memory=True, tgt_mask=causal(KEYS)),
        ["module.self_attn", "module.multihead_attn"],
    ),
    "transformer": (
        lambda: Calls(nn.Transformer(SIZE, 2, 1, 1, 16, batch_first=True), memory=True),
        [
            "module.encoder.layers.0.self_attn",
            "module.decoder.layers.0.self_attn",
            "module.decoder.layers.0.multihead_attn",
        ],
    ),
    "twice": (lambda: Twice(None), ["attention"]),
    "twice-crossed": (lambda: Twice(0), ["attention"]),
    "vit": (
        vision_transformer,
        ["encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1.self_attention"],
    ),
}


def example_for(kind: str) -> Tensor:
    """Give samples a network takes."""
    return torch.randn(SAMPLES, 3, 32, 32) if kind == "vit" else torch.randn(SAMPLES, KEYS, SIZE)


def build(kind: str) -> tuple[nn.Module, list[str]]:
    """Give a network and the paths of its attention."""
    torch.manual_seed(0)
    make, paths = NETWORKS[kind]
    return make().eval(), paths


def refuse_fused_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's fast paths fail."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a fast path was taken")

    for name in FUSED_CALLS:
        monkeypatch.setattr(torch, name, fail)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_networks_compute_the_same_and_torch_sees_primitive_calls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, paths = build(kind)
    x = example_for(kind)
    expected = network(x)
    assert decompose_attention(network, x) == paths
    assert not any(isinstance(module, nn.MultiheadAttention) for module in network.modules())
    refuse_fused_calls(monkeypatch)
    assert torch.allclose(network(x), expected, atol=1e-5)
    assert torch.allclose(network(x[:1]), expected[:1], atol=1e-5)
    trace = trace_network(network, x)
    inside = {call.name for call in trace.calls if call.module in paths}
    assert inside <= PRIMITIVE
    assert not {"multi_head_attention_forward", *FUSED_CALLS} & {call.name for call in trace.calls}
    called = {span.path for span in trace.spans}
    assert all(f"{path}.out_proj" in called for path in paths)


@pytest.mark.parametrize("kind", ["layer", "encoder", "encoder-padded", "vit"])
@torch.no_grad()
def test_untouched_networks_take_fast_paths(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = build(kind)
    refuse_fused_calls(monkeypatch)
    with pytest.raises(AssertionError, match="fast path"):
        network(example_for(kind))


def test_projections_follow_from_how_attention_is_called() -> None:
    network, _ = build("decoder")
    decompose_attention(network, example_for("decoder"))
    assert [network.module.self_attn.fused, network.module.multihead_attn.fused] == [True, False]
    trace = trace_network(network, example_for("decoder"))
    read = {span.path.rpartition(".")[2]: span.input for span in trace.spans if "multihead_attn." in span.path}
    assert read["k_proj"] == read["v_proj"] != read["q_proj"]
    assert [span.path for span in trace.spans].count("module.self_attn.in_proj") == 1


@pytest.mark.parametrize("crossed", [None, 0, 1])
def test_shared_attention_stays_shared_and_is_fused_if_all_calls_allow_it(crossed: int | None) -> None:
    network = Twice(crossed).eval()
    assert decompose_attention(network, example_for("twice")) == ["attention"]
    assert network.attention is network.same[0] is network.same[1]
    assert network.attention.fused == (crossed is None)


class NotCalled(nn.Module):
    """Attention whose parameters are read, but not by its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(SIZE, 2), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.attention.out_proj.weight


class OwnAttention(nn.MultiheadAttention):
    """A user's subclass, whose doubling must not vanish."""

    def forward(self, query: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(query, query, query)[0]


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU()), NotCalled(), nn.Sequential(OwnAttention(SIZE, 2))],
    ids=["none", "not-called", "subclass"],
)
def test_what_must_not_be_taken_apart_stays(network: nn.Module) -> None:
    network.eval()
    before = dict(network.named_modules())
    x = example_for("layer")
    expected = network(x)
    assert decompose_attention(network, x) == []
    assert dict(network.named_modules()) == before
    assert torch.equal(network(x), expected)


def test_no_hook_is_left_behind_when_the_forward_pass_fails() -> None:
    network = Calls(layer()).eval()
    with pytest.raises(UserError, match="failed on an input"):
        decompose_attention(network, torch.randn(SAMPLES, KEYS, SIZE + 1))
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert isinstance(network.module.self_attn, nn.MultiheadAttention)
