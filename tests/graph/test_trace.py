"""Recording a forward pass, and inserting quantized layers by it."""

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pack_ptq.errors import UserError
from pack_ptq.graph.insert import insert_quantized_layers
from pack_ptq.graph.prepare import prepare
from pack_ptq.graph.trace import INPUT, Shape, batch_of, trace_network
from pack_ptq.quant.layers import QuantizedLayer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """Two convolutions and what a test does between them."""

    def __init__(self, between, after=lambda y: y) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.between, self.after = between, after

    def forward(self, x: Tensor):
        return self.after(self.b(self.between(self.a(x))))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 9])
def test_batch_of_cuts_or_repeats(size: int) -> None:
    x = torch.arange(4.0)
    assert torch.equal(batch_of(x, size), x.repeat(3)[:size])


def test_shapes_follow_the_batch() -> None:
    trace = trace_network(Function(lambda y: y.flatten(2).flatten(0, 1).view(-1, 4, 6, 6)), X)
    forms = [call.output.at(5) for call in trace.calls]
    assert forms == [(5, 4, 6, 6), (5, 4, 36), (20, 36), (5, 4, 6, 6), (5, 4, 4, 4)]
    assert Shape(((2, 3), (6, 9), (3, 3)), torch.float32).at(1) == (1, 3, 3)


def test_data_is_followed_through_calls() -> None:
    trace = trace_network(Function(lambda y: F.relu(y) + torch.ones(4, 1, 1) * y.shape[1]), X)
    names = [call.name for call in trace.calls]
    assert names[0] == names[-1] == "conv2d"
    assert trace.calls[0].inputs == (INPUT,)
    assert trace.calls[names.index("ones")].inputs == ()
    assert trace.consumers(0) == [names.index("relu")], "asking for the shape is not computing"
    assert trace.output == len(trace.calls) - 1
    assert [(span.path, span.first, span.last) for span in trace.spans][:2] == [("", 0, trace.output), ("a", 0, 0)]


def test_overwritten_values_are_known() -> None:
    def between(y: Tensor) -> Tensor:
        y[:, :1].mul_(2)  # through a view
        z = y + 1
        F.relu(z, inplace=True)
        return z * 2

    trace = trace_network(Function(between), X)
    names = [call.name for call in trace.calls]
    assert {0, names.index("add")} <= trace.changed
    assert not {INPUT, names.index("mul"), trace.output} & trace.changed
    assert INPUT in trace_network(nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 4, 1)), X).changed


def test_a_value_whose_tensor_is_gone_is_overwritten_through_a_view() -> None:
    trace = trace_network(Function(lambda y: (y + 1).flatten(2).mul_(2).unflatten(2, (6, 6))), X)
    names = [call.name for call in trace.calls]
    assert trace.changed == {names.index("add"), names.index("flatten")}


def test_a_view_from_before_the_data_came_in_overwrites_it() -> None:
    def between(y: Tensor) -> Tensor:
        buffer = torch.zeros(y.shape)
        view = buffer[0]
        buffer.add_(y)
        y = buffer * 2
        view.mul_(3)
        return buffer + y

    trace = trace_network(Function(between), X)
    assert [trace.calls[index].name for index in trace.changed] == ["add_"]


def test_sparse_values_have_no_storage() -> None:
    trace = trace_network(Function(lambda y: y.to_sparse().to_dense() + y), X)
    assert not trace.changed


@pytest.mark.parametrize(
    ("between", "place"), [(lambda y: y.max(1, keepdim=True).values, 0), (lambda y: y.chunk(4, 1)[2] * 2, 2)]
)
def test_the_only_one_of_several_tensors_that_is_read(between: Callable[[Tensor], Tensor], place: int) -> None:
    trace = trace_network(Function(lambda y: between(y) * torch.ones(4, 1, 1)), X)
    call = next(call for call in trace.calls if call.name in ("max", "chunk"))
    assert call.read == {place}
    assert call.form == Shape(((2, 3), (1, 1), (6, 6), (6, 6)), torch.float32)


def test_of_several_tensors_that_are_read_none_is_the_value() -> None:
    trace = trace_network(Function(lambda y: torch.cat(y.chunk(2, 1), 1)), X)
    call = next(call for call in trace.calls if call.name == "chunk")
    assert (call.read, call.place, call.form) == ({0, 1}, None, None)


def test_values_that_the_network_lets_go_are_not_kept() -> None:
    kept = []

    def between(y: Tensor) -> Tensor:
        first = weakref.ref(y + 1)
        y = (y + 2) * 2
        kept.append(first())
        return y

    trace_network(Function(between), X)
    assert kept == [None, None]


def test_the_input_is_not_overwritten_by_tracing() -> None:
    x = X.clone()
    trace_network(nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 4, 1)), x)
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "output",
    [lambda y: {"logits": y}, lambda y: (y, y), lambda y: None, lambda y: y.shape[0], lambda y: torch.zeros(2)],
    ids=["dict", "tuple", "none", "number", "constant"],
)
def test_wrong_outputs_are_refused(output) -> None:
    with pytest.raises(UserError, match=r"output is .*; allowed: one tensor that is computed from the input"):
        prepare(Function(lambda y: y, output), X)


@pytest.mark.parametrize("threshold", [-100.0, 100.0], ids=["taken", "not-taken"])
@pytest.mark.parametrize(
    "condition",
    [
        lambda y, t: bool(y.mean() > t),
        lambda y, t: y.mean().item() > t,
        lambda y, t: float(y.mean()) > t,
        lambda y, t: y.mean((0, 2, 3)).tolist()[0] > t,
        lambda y, t: torch.equal(y, y + t),
    ],
    ids=["bool", "item", "float", "tolist", "equal"],
)
def test_control_flow_by_data_is_refused(threshold: float, condition) -> None:
    network = Function(lambda y: F.relu(y) if condition(y, threshold) else torch.sigmoid(y))
    with pytest.raises(UserError, match=r"control flow may depend on the data; allowed: a fixed forward pass"):
        prepare(network, X)


def test_control_flow_by_batch_size_is_refused() -> None:
    network = Function(lambda y: F.relu(y) if len(y) % 2 else torch.sigmoid(y))
    with pytest.raises(UserError, match="depends on the batch size or the data; allowed: a fixed forward pass"):
        prepare(network, X)


def test_autocast_is_refused_where_it_is_on() -> None:
    def cast(x: Tensor, enabled: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return (x @ x.mT).float()

    with pytest.raises(UserError, match=r"torch\.autocast; allowed"):
        trace_network(Function(lambda y: cast(y, True)), X)
    assert trace_network(Function(lambda y: cast(y, False)), X).calls


def test_control_flow_by_shape_is_fine() -> None:
    network = Function(lambda y: F.relu(y) if y.shape[1] == 4 and y.dim() == 4 else y)
    assert len(prepare(network, X).chain) == 2


def test_a_failing_network_says_on_what() -> None:
    with pytest.raises(UserError, match=r"failed on an input of shape \(2, 3, 8, 8\): RuntimeError"):
        prepare(nn.Sequential(nn.Conv2d(5, 3, 1)), X)


def test_layers_that_read_the_same_value_share_their_quantizer() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.out = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.out(self.left(y) + self.right(y))

    ready = prepare(Fork(), X)
    network, layers = ready.chain.network, ready.chain.layers
    assert list(layers) == ["stem", "left", "right", "out"]
    assert ready.left_out == ("unused",)
    assert layers["left"].input_quantizer is layers["right"].input_quantizer
    assert len({id(layer.input_quantizer) for layer in layers.values()}) == 3
    assert all(isinstance(getattr(network, path), QuantizedLayer) for path in layers)
    assert not isinstance(network.unused, QuantizedLayer)


def test_a_layer_in_two_places_is_wrapped_once() -> None:
    layer = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    insert_quantized_layers(network, trace_network(network, X))
    assert isinstance(network[0], QuantizedLayer)
    assert network[0] is network[1][1]


def test_input_elements_count_one_sample_of_every_call() -> None:
    layer = nn.Conv2d(3, 3, 1)
    chain = prepare(nn.Sequential(layer, layer, nn.Conv2d(3, 2, 1)), X).chain
    assert {path: module.input_elements for path, module in chain.layers.items()} == {"0": 2 * 192, "2": 192}


def test_inference_mode_around_the_preparation_does_not_matter() -> None:
    network = Function(F.relu)
    with torch.inference_mode():
        chain = prepare(network, X + 0).chain
    assert chain.trace.changed == prepare(network, X).chain.trace.changed
    assert torch.allclose(chain.run(X), network(X), atol=1e-6)
