"""Which blocks the search finds in small networks, what the override may say, and what is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.prepare import prepare

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Block(nn.Module):
    def __init__(self, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shortcut = conv(), conv(), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(x + y) if self.shortcut else F.relu(y)


class Blocks(nn.Module):
    """Stem, blocks with and without shortcut, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3), nn.Sequential(Block(), Block(shortcut=False), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 0.5)


class RootResiduals(nn.Module):
    """Shortcuts are added in the root's forward, so no module holds a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d = conv(3), conv(), conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(F.relu(self.a(x)))
        return F.relu(x + self.d(F.relu(self.c(x))))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.out = conv(3), conv(), nn.Sequential(conv(), conv()), conv(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(torch.cat([self.left(x), self.right(x)], 1))


class Shared(nn.Module):
    """The layer `both` is called before and after another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both, self.between, self.out = conv(3), conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.both(self.between(self.both(self.stem(x)))))


class Gate(nn.Module):
    """Squeeze and excitation: it joins by a product and is no block."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class GatedBlock(nn.Module):
    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.expand, self.gate, self.project, self.shortcut = conv(), Gate(), conv(), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(F.relu(self.expand(x))))
        return x + y if self.shortcut else y


class Tangle(nn.Module):
    """The stem's output is read to the end, so nothing is passed by all data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y) + x
        return y


class Video(nn.Module):
    """Frames are laid into the batch, where a value no longer tells how many samples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3), conv(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        y = self.b(F.relu(self.a(x.flatten(0, 1))))
        return self.head(y.mean((2, 3)).view(batch, frames, -1).mean(1))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3), conv(), nn.Linear(4, 2)
        self.unused = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.max_pool2d(F.relu(self.a(x)), 2))).mean((2, 3)))


def chain_of(network: nn.Module, blocks: str | list[str] | None = None, x: Tensor = X) -> Chain:
    network.eval()
    chain = prepare(network, x, blocks).chain
    with torch.no_grad():
        assert torch.allclose(chain.run(x), network(x), atol=1e-5)
    return chain


def layers_in(chain: Chain) -> list[tuple[str, ...]]:
    return [element.layers for element in chain.elements]


BODY = ("body.0", "body.1", "body.2")


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (Blocks(), ("stem", *BODY, "head")),
        (Wrapper(Blocks()), ("inner.stem", *[f"inner.{name}" for name in BODY], "inner.head")),
        (Wrapper(Wrapper(Blocks())), ("inner.inner.stem", *[f"inner.inner.{b}" for b in BODY], "inner.inner.head")),
        (nn.DataParallel(Blocks()), ("module.stem", *[f"module.{name}" for name in BODY], "module.head")),
        (RootResiduals(), ("stem", "a+b", "c+d")),
        (Branches(), ("stem", "left+right.0+right.1", "out")),
        (Shared(), ("stem", "both+between", "out")),
        (nn.Sequential(conv(3), GatedBlock(True), GatedBlock(False), conv()), ("0", "1", "2", "3")),
        (FeedForward(), ("a", "b", "head")),
        (nn.Sequential(conv(3), conv(), conv()), ("0", "1", "2")),
    ],
    ids=["blocks", "wrapper", "twice", "parallel", "root", "branches", "shared", "gates", "plain", "sequential"],
)
def test_names_found(network: nn.Module, names: tuple[str, ...]) -> None:
    assert chain_of(network).names == names


def test_a_block_called_twice_is_one_link() -> None:
    block = Block()
    assert chain_of(nn.Sequential(conv(3), block, block, conv())).names == ("0", "1.conv1+1.conv2", "3")


def test_frames_in_the_batch_are_no_boundary() -> None:
    chain = chain_of(Video(), x=torch.randn(2, 5, 3, 8, 8))
    assert chain.names == ("a+b", "head")
    x = torch.randn(7, 5, 3, 8, 8)
    assert torch.allclose(chain.run(chain.run(x, 0, 1), 1), chain.network(x))


def test_activation_and_maximum_stay_with_the_layer_before_and_averaging_goes_on() -> None:
    chain = chain_of(FeedForward())
    pooled, activated = chain.run(X, 0, 1), chain.run(X, 0, 2)
    assert pooled.shape == activated.shape == (4, 4, 4, 4)
    assert activated.min() == 0


class Pooled(nn.Module):
    """Points through a layer, then pooled, as PointNet does."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.points, self.head, self.pool = nn.Conv1d(3, 4, 1), nn.Linear(4, 2), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.points(x.flatten(2)))))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.amax(2),
        lambda x: x.max(-1).values,
        lambda x: torch.max(x, 2, keepdim=True)[0].view(-1, 4),
        lambda x: F.max_pool1d(x, x.shape[-1]).flatten(1),
        lambda x: F.adaptive_max_pool1d(x, 1).squeeze(2),
        lambda x: x[..., 0],
        lambda x: x.select(2, 0),
        lambda x: x.unbind(2)[1],
        lambda x: x.transpose(1, 2).amax(1),
        lambda x: x.transpose(1, 2)[:, 0],
        lambda x: x[:, :, None].amax((2, 3)),
    ],
)
def test_a_selection_stays_with_the_layer_before(pool: Callable[[Tensor], Tensor]) -> None:
    chain = chain_of(Pooled(pool))
    value = chain.run(X, 0, 1)
    assert value.numel() == 4 * 4
    assert torch.allclose(chain.run(value, 1, 2), chain.network(X))


def test_several_parts_that_are_read_are_no_boundary() -> None:
    chain = chain_of(Pooled(lambda x: (lambda parts: parts[0] + parts[1])(x.unbind(2))))
    assert chain.run(X, 0, 1).shape == (4, 4)


def test_a_maximum_that_is_repeated_for_every_point_goes_on() -> None:
    network = Pooled(lambda x: torch.cat([x, x.amax(2, keepdim=True).expand_as(x)], 2).transpose(1, 2))
    assert chain_of(network).run(X, 0, 1).shape == (4, 4, 64)


def test_an_average_goes_on() -> None:
    assert chain_of(Pooled(lambda x: x.mean(2))).run(X, 0, 1).shape == (4, 4, 64)


def test_a_selection_of_what_is_no_data_does_not_count() -> None:
    table = torch.rand(3, 4)
    assert chain_of(Pooled(lambda x: x.mean(2) * table[0])).run(X, 0, 1).shape == (4, 4, 64)


def test_unused_layer_is_left_out() -> None:
    assert prepare(FeedForward(), X).left_out == ("unused",)


class TestOverride:
    @pytest.mark.parametrize(
        ("blocks", "names"),
        [
            ("body", ("stem", "body", "head")),
            ("body.?", ("stem", *BODY, "head")),
            ("body*", ("stem", "body", "head")),
            ("body.*", ("stem", *BODY, "head")),
            ("b[o]dy.[0-1]", ("stem", "body.0", "body.1", "body.2.conv1+body.2.conv2", "head")),
            ("*", ("stem", "body", "head")),
            (".", (".",)),
            (["body.0", "body.1", "body.2"], ("stem", *BODY, "head")),
            (["stem", "body", "head"], ("stem", "body", "head")),
            (["body", "body.0"], ("stem", "body", "head")),
            (["body.0", "body"], ("stem", "body", "head")),
            (
                "body.1.conv1",
                (
                    "stem",
                    "body.0.conv1+body.0.conv2",
                    "body.1.conv1",
                    "body.1.conv2",
                    "body.2.conv1+body.2.conv2",
                    "head",
                ),
            ),
        ],
    )
    def test_taken_as_said(self, blocks: str | list[str], names: tuple[str, ...]) -> None:
        assert chain_of(Blocks(), blocks).names == names

    @pytest.mark.parametrize("blocks", ["nope", "body.7", "nope.*", ["body", "nope"], ""])
    def test_unknown_names_are_refused(self, blocks: str | list[str]) -> None:
        with pytest.raises(UserError, match=r"model\.blocks is .*no called module matches; allowed: names"):
            chain_of(Blocks(), blocks) if blocks else prepare(FeedForward(), X, "unused")

    @pytest.mark.parametrize("blocks", ["body.0.conv1", "body.0.conv2", ["body.0", "body.2.conv1"]])
    def test_parts_of_a_branch_are_refused(self, blocks: str | list[str]) -> None:
        with pytest.raises(UserError, match=r"model\.blocks is .*cannot be a block; allowed: modules with"):
            chain_of(Blocks(), blocks)

    def test_modules_without_layers_are_refused(self) -> None:
        network = nn.Sequential(conv(3), nn.ReLU(), conv())
        with pytest.raises(UserError, match=r"model\.blocks is '1', but '1' cannot be a block"):
            chain_of(network, "1")
        assert chain_of(network, "[01]").names == ("0", "2")

    def test_it_rescues_a_network_without_a_chain(self) -> None:
        chain = chain_of(Tangle(), ".")
        assert chain.names == (".",)
        assert len(chain.layers) == 6


class TestRefusals:
    def test_no_chain(self) -> None:
        with pytest.warns(UserWarning, match="no inner value that all its data passes through, so all of it is one"):
            chain = prepare(Tangle(), X).chain
        assert len(chain) == 1

    def test_no_layers(self) -> None:
        with pytest.raises(UserError, match="no layer that can be quantized; allowed: Conv1d, Conv2d"):
            prepare(nn.Sequential(nn.ReLU(), nn.Flatten()), X)

    @pytest.mark.parametrize("network", [nn.Conv2d(3, 4, 1), nn.Linear(8, 2)])
    def test_a_bare_layer(self, network: nn.Module) -> None:
        with pytest.raises(UserError, match=r"is a single .*; allowed: a module with layers inside"):
            prepare(network, X)

    def test_what_cannot_be_copied(self) -> None:
        network = nn.Sequential(conv(3))
        network.generator = (i for i in range(3))
        with pytest.raises(UserError, match=r"cannot be copied .*; allowed"):
            prepare(network, X)

    def test_what_differs_at_every_call(self) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = conv(3), conv()

            def forward(self, x: Tensor) -> Tensor:
                return self.b(F.dropout(self.a(x), training=True))

        with pytest.raises(UserError, match=r"gives another output than the network itself; .*model\.blocks"):
            prepare(Noisy(), X)
