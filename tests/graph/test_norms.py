"""Scale re-parameterisation of LayerNorm: what is found, that the function stays, and the identity it rests on."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pack_ptq import calibration, observe, prepare
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.norms import NormSite, find_norms, put_norm, put_norms, reparameterise, watch_norms
from pack_ptq.quant.channel_observer import ChannelObserver

WIDTH = TOKENS = 8
VIT = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4}
VIT_SITES = [
    *[
        NormSite(f"blocks.{block}.{norm}", (f"blocks.{block}.{layer}",))
        for block in range(2)
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
    ],
    NormSite("norm", ("head",)),
]
SWIN_SITES = [
    NormSite(f"layers.0.blocks.{block}.{norm}", (f"layers.0.blocks.{block}.{layer}",))
    for block in range(2)
    for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
]


def vit(**settings: Any) -> nn.Module:
    return timm.models.VisionTransformer(**VIT, **settings)


def swin() -> nn.Module:
    return timm.models.SwinTransformer(**SWIN, num_classes=3)


class Small(nn.Module):
    """A norm between a stem and some layers, computed with as told, for samples of `TOKENS` x 4."""

    def __init__(
        self, compute: Callable[[Any, Tensor], Tensor], bias: bool = True, norm_bias: bool = True, affine: bool = True
    ) -> None:
        super().__init__()
        self.compute, self.stem = compute, nn.Linear(4, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=affine, bias=norm_bias)
        self.fc, self.other = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.compute(self, self.stem(x)).relu().mean(1))


def twice(own: Any, x: Tensor) -> Tensor:
    return own.fc(own.norm(own.other(own.norm(x)).relu()))


def shifted(own: Any, x: Tensor) -> Tensor:
    return own.fc(own.norm(x).roll(1, 1).reshape(-1, 2, WIDTH).permute(1, 0, 2)).permute(1, 0, 2).reshape(x.shape)


FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "one layer": (lambda: Small(lambda own, x: own.fc(own.norm(x))), ("fc",)),
    "two layers": (lambda: Small(lambda own, x: own.fc(y := own.norm(x)) + own.other(y)), ("fc", "other")),
    "layer without bias": (lambda: Small(lambda own, x: own.fc(own.norm(x)), bias=False), ("fc",)),
    "norm without bias": (lambda: Small(lambda own, x: own.fc(own.norm(x)), norm_bias=False), ("fc",)),
    "moved on the way": (lambda: Small(shifted), ("fc",)),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "read by a sum": lambda: Small(lambda own, x: own.fc(y := own.norm(x)) + y),
    "read by a product": lambda: Small(lambda own, x: own.fc(y := own.norm(x)) @ y.mT),
    "read by a nonlinearity": lambda: Small(lambda own, x: own.fc(own.norm(x).relu())),
    "no affine weights": lambda: Small(lambda own, x: own.fc(own.norm(x)), affine=False),
    "called twice": lambda: Small(twice),
    "layer reads something else too": lambda: Small(lambda own, x: own.fc(own.norm(x)) + own.fc(x)),
    "channels are not what the layer sums over": lambda: Small(lambda own, x: own.fc(own.norm(x).mT)),
    "channels are reordered": lambda: Small(lambda own, x: own.fc(own.norm(x)[..., torch.arange(WIDTH).flip(0)])),
    "padded with zeros": lambda: Small(lambda own, x: own.fc(nn.functional.pad(own.norm(x), (0, 0, 1, 1)))),
    "nothing reads it": lambda: Small(lambda own, x: x + 0 * own.norm(x).sum() + own.fc(x)),
}


def chain_of(build: Callable[[], nn.Module], x: Tensor) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().eval()
        for parameter in network.parameters():  # as training leaves them: no norm is the identity
            parameter.data += 0.1 * torch.randn_like(parameter)
    return prepare(network, x).chain


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[NormSite]]] = {
    "vit": (vit, (1, 16, 16), VIT_SITES),
    "vit without qkv bias": (lambda: vit(qkv_bias=False), (1, 16, 16), VIT_SITES),
    "swin": (swin, (3, 16, 16), SWIN_SITES),
    **{name: (build, (TOKENS, 4), [NormSite("norm", layers)]) for name, (build, layers) in FOUND.items()},
}


def case(name: str) -> tuple[Chain, list[NormSite], Tensor]:
    """Give a chain, the sites that it has, and samples at a batch size other than the traced one."""
    build, shape, sites = NETWORKS[name]
    return chain_of(build, noise(2, *shape)), sites, noise(5, *shape, seed=1)


def calibrated(chain: Chain, sites: list[NormSite], x: Tensor) -> None:
    watch_norms(chain, sites)
    observe(chain, [x[:2], x[2:]])


@torch.no_grad()
def normed(chain: Chain, site: NormSite, x: Tensor) -> Tensor:
    """Give what a norm gives."""
    seen: list[Tensor] = []
    handle = chain.network.get_submodule(site.path).register_forward_hook(lambda module, args, y: seen.append(y))
    chain.network(x)
    handle.remove()
    return seen[0]


@torch.no_grad()
def read(chain: Chain, path: str, x: Tensor) -> Tensor:
    """Give what a layer reads, which may be some tokens only."""
    seen: list[Tensor] = []
    handle = chain.layers[path].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    chain.network(x)
    handle.remove()
    return seen[0]


def copied(chain: Chain) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in chain.network.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_norms_are_found_with_their_layers_and_nothing_is_changed(name: str) -> None:
    chain, sites, x = case(name)
    before, output = copied(chain), chain.network(x)
    assert find_norms(chain, x[:2]) == sites
    assert_equal(copied(chain), before)
    assert torch.equal(chain.network(x), output)


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_other_norms_are_left_as_they_are(name: str) -> None:
    x = noise(2, TOKENS, 4)
    chain = chain_of(REFUSED[name], x)
    before = copied(chain)
    assert find_norms(chain, x) == []
    assert_equal(copied(chain), before)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_any_factors_keep_the_function(name: str, seed: int) -> None:
    chain, sites, x = case(name)
    expected = chain.network(x)
    for index, site in enumerate(sites):
        before = normed(chain, site, x)
        generator = torch.Generator().manual_seed(10 * seed + index)
        divisor = torch.rand(before.shape[-1], generator=generator) * 3.75 + 0.25
        shift = torch.randn(before.shape[-1], generator=generator)
        put_norm(chain, site, (divisor, shift))
        assert torch.allclose(normed(chain, site, x), (before + shift) / divisor, atol=1e-5)
    assert torch.allclose(chain.network(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in chain.network.parameters())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_one_scale_then_gives_the_codes_that_every_channels_own_gave(name: str, bits: int) -> None:
    """Equations 7 to 11 of arXiv 2212.08254; in double precision, so that no rounding falls to the other side."""
    chain, sites, x = case(name)
    chain.network.double()
    x = x.double()
    calibrated(chain, sites, x)
    # Read before the first is changed: the norms behind it see its layers' rounding errors.
    expected = {}
    for site in sites:
        channels: Any = chain.layers[site.layers[0]].input_quantizer.channels
        scale, zero_point = channels.affine(bits)
        codes = ((normed(chain, site, x) / scale).round() + zero_point).clamp(0, 2**bits - 1)
        expected[site] = codes, scale.mean(), zero_point.mean().round()
    reparameterise(chain, sites, bits)
    for site, (codes, scale, zero_point) in expected.items():
        ours = ((normed(chain, site, x) / scale).round() + zero_point).clamp(0, 2**bits - 1)
        assert torch.equal(ours, codes)


@pytest.mark.parametrize("name", ["vit", "swin", "two layers"])
@torch.no_grad()
def test_function_stays_and_observers_know_the_new_values(name: str) -> None:
    chain, sites, x = case(name)
    expected = chain.network(x)
    calibrated(chain, sites, x)
    counted = {site: chain.layers[site.layers[0]].input_quantizer.observer.histogram.sum() for site in sites}
    reparameterise(chain, sites, 4)
    assert torch.allclose(chain.network(x), expected, rtol=1e-5, atol=1e-5)
    for site in sites:
        for path in site.layers:
            values = read(chain, path, x)
            widest = (values.flatten(0, -2).amax(0) - values.flatten(0, -2).amin(0)).max().item() / 128
            mean = values.flatten(0, -2).mean(0)
            torch.testing.assert_close(chain.layers[path].input_mean, mean, atol=1e-4, rtol=1e-4)
            quantizer = chain.layers[path].input_quantizer
            assert quantizer.channels is None
            assert quantizer.observer.histogram.sum() == counted[site]
            assert quantizer.observer.low.item() == pytest.approx(values.min().item(), abs=widest)
            assert quantizer.observer.high.item() == pytest.approx(values.max().item(), abs=widest)
            centers, counts = quantizer.observer.counts()
            overall = (centers * counts).sum() / counts.sum()
            assert overall.item() == pytest.approx(values.mean().item(), abs=widest)


@pytest.mark.parametrize("name", ["vit", "vit without qkv bias", "swin", "two layers", "norm without bias"])
def test_a_freshly_prepared_network_is_moved_the_same_way(name: str) -> None:
    chain, sites, x = case(name)
    calibrated(chain, sites, x)
    done = reparameterise(chain, sites, 4)
    assert list(done) == [site.path for site in sites]
    other = case(name)[0]
    put_norms(other, done)
    assert_equal(copied(other), copied(chain))


def test_a_channel_that_is_always_0_does_not_stand_out() -> None:
    """Pruned channels; what its layers' weights are multiplied with would widen the range of every row."""
    chain, sites, x = case("one layer")
    norm: Any = chain.network.get_submodule("norm")
    norm.weight.data *= 0.01
    norm.bias.data *= 0.01
    norm.weight.data[3] = norm.bias.data[3] = 0
    calibrated(chain, sites, x)
    divisor = reparameterise(chain, sites, 4)["norm"]["divisor"]
    others = divisor[torch.arange(WIDTH) != 3]
    assert others.min() <= divisor[3] <= others.max()


def test_processes_merge_channels_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses differ between processes, and a sum over processes adds what comes at the same time."""
    chain, sites, _ = case("vit")
    observers = [ChannelObserver() for _ in sites]
    for given in (observers, observers[::-1]):
        merged: list[int] = []
        for site, observer in zip(sites, given, strict=True):
            observer.low = observer.high = torch.zeros(16)
            observer.histogram = torch.zeros(16, 128)
            chain.layers[site.layers[0]].input_quantizer.channels = observer
        owners = {id(observer.histogram): index for index, observer in enumerate(given)}

        def all_reduce(x: Tensor, how: str = "sum", owners: dict = owners, merged: list = merged) -> Tensor:
            merged.extend([owners[id(x)]] if id(x) in owners else [])
            return x

        monkeypatch.setattr(calibration, "all_reduce", all_reduce)
        calibration.merge_observers(chain, "values")
        assert merged == list(range(len(sites)))


def class_attention(own: Any, x: Tensor) -> Tensor:
    """As CaiT: one layer reads the first token alone, another all of them."""
    y = own.norm(x)
    return own.fc(y[:, :1]) + own.other(y)


def test_each_reader_has_the_range_of_what_it_reads() -> None:
    x = noise(40, TOKENS, 4, seed=1)
    x[:, 0] *= 0.01
    shapes = []
    for _ in range(3):
        chain = chain_of(lambda: Small(class_attention), noise(2, TOKENS, 4))
        sites = find_norms(chain, x[:2])
        assert sites == [NormSite("norm", ("fc", "other"))]
        calibrated(chain, sites, x)
        done = reparameterise(chain, sites, 4)
        for path in ("fc", "other"):
            seen, observer = read(chain, path, x), chain.layers[path].input_quantizer.observer
            low, high = observer.low.item(), observer.high.item()
            margin = 0.02 * (high - low)  # of a bin
            assert low - margin <= seen.min() <= low + margin
            assert high - margin <= seen.max() <= high + margin
        shapes.append(done["norm"]["divisor"])
    assert torch.equal(shapes[0], shapes[1])
    assert torch.equal(shapes[0], shapes[2])
