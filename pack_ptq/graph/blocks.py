"""Find the chain of blocks of a network in execution order, by its structure alone.

All data passes through some values of the forward pass (*cuts*: the dominators of the output). Layers with no cut
between them belong together: a residual branch, a dense block, an inception module. Modules then tell which of these
groups form one block; `group_layers` holds the rules.
"""

import math
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.graph.trace import INPUT, Call, ModuleSpan, Shape, Trace

PLAIN_BLOCK_LAYERS = 4
SELECTIONS = {"max", "amax", "__getitem__", "select", "narrow", "index_select", "unbind"}
HINT = "override the search with model.blocks, a list or pattern of module names ('.' is the whole network)"


@dataclass(frozen=True)
class Element:
    """One link of the chain: the calls after value `start` up to value `stop`, the layers and products among them."""

    name: str
    layers: tuple[str, ...]
    start: int
    stop: int
    products: tuple[str, ...] = ()


@dataclass
class _Group:
    layers: list[str]
    first: int
    last: int
    end: int = INPUT  # the call at which all data has come together again
    span: ModuleSpan | None = None

    def join(self, other: "_Group") -> None:
        self.layers += [layer for layer in other.layers if layer not in self.layers]
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)


def find_cuts(trace: Trace, in_place: bool) -> list[int]:
    """Give the values that all data passes through, in order; each is the one tensor that its call gives.

    Args:
        trace: A recording of the network.
        in_place: Also take results that are the same object as an argument, as `x += y` gives. They are no good as the
            start of a run if the network goes on with the argument instead of the result.
    """
    last_use = {INPUT: -1}
    for index, call in enumerate(trace.calls):
        if call.kind != "other":
            last_use.update(dict.fromkeys(call.inputs, index))
    last_use[trace.output] = len(trace.calls)
    cuts, reach = [], last_use[INPUT]
    for index, call in enumerate(trace.calls):
        if not call.inputs or call.kind == "other":
            continue
        # A value whose first dimension is not the batch, as images in time, does not tell the size of the batch.
        by_sample = call.form is not None and call.form.dims[:1] == ((2, 3),)
        if reach <= index and by_sample and (call.new or (in_place and isinstance(call.output, Shape))):
            cuts.append(index)
        reach = max(reach, last_use.get(index, -1))
    return [cut for cut in cuts if cut <= trace.output]


def find_chain(trace: Trace, override: str | list[str] | None = None, in_place: bool = False) -> list[Element]:
    """Find the links of the chain; each quantized layer is in exactly one.

    Args:
        trace: A recording of the network with its quantized layers.
        override: Names or patterns of modules that are to be blocks, instead of the search. A network in which data
            flows past every inner value is one block, also without.
        in_place: As for `find_cuts`.

    Raises:
        UserError: The override names something that cannot be a block.
    """
    cuts = find_cuts(trace, in_place)
    groups = _atoms(trace, cuts)
    if override is None and len(groups) == 1 and len(groups[0].layers) > PLAIN_BLOCK_LAYERS:
        warnings.warn(
            "the network has no inner value that all its data passes through, so all of it is one block", stacklevel=2
        )
        override = "."
    if override is not None:
        groups = _merge(groups, _named_blocks(trace, groups, override))
    else:
        groups = _merge(groups, group_layers(trace, groups))
    return _elements(trace, cuts, groups)


def _atoms(trace: Trace, cuts: list[int]) -> list[_Group]:
    """Group the layers that have no cut between them, or that are called again later."""
    calls = [(index, call.layer) for index, call in enumerate(trace.calls) if call.layer is not None]
    groups: list[_Group] = []
    for index, layer in calls:
        new = _Group([layer], index, index)
        if groups and not any(groups[-1].last <= cut < index for cut in cuts):
            groups[-1].join(new)
        else:
            groups.append(new)
        while (again := next((g for g in groups[:-1] if layer in g.layers), None)) is not None:
            while groups[-1] is not again:
                again.join(groups.pop())
    for group in groups:
        group.end = next((cut for cut in cuts if cut >= group.last), trace.output)
    return groups


def _covered(span: ModuleSpan, groups: list[_Group]) -> list[_Group] | None:
    """Give the groups inside a module's call, or nothing if it covers a part of one."""
    inside = [g for g in groups if span.first <= g.first and g.last <= span.last]
    touched = [g for g in groups if g.first <= span.last and span.first <= g.last]
    return inside if inside and len(inside) == len(touched) else None


def group_layers(trace: Trace, groups: list[_Group]) -> list[ModuleSpan]:
    """Choose the modules that are blocks.

    1. A module with exactly one group of several layers (a residual block) is a block, unless the group is a gate.
    2. Every module of the same class is one too, such as the blocks of MobileNetV2 without a shortcut.
    3. So is any other module of 2 to 4 layers with a forward of its own (no `nn.Sequential`) and no block inside.

    Every other layer is a block by itself.
    """
    calls: dict[str, int] = {}
    for span in trace.spans:
        calls[span.path] = calls.get(span.path, 0) + 1
    candidates: list[tuple[ModuleSpan, list[_Group]]] = []
    for span in trace.spans:
        inside = _covered(span, groups) if calls[span.path] == 1 and span.path else None
        if inside and len(inside) < len(groups):
            candidates.append((span, inside))
    innermost: dict[int, ModuleSpan] = {}
    for span, inside in candidates:  # spans come outside in
        # Squeeze-and-excitation joins its branch by a product: it refines a block and is none.
        is_gate = "mul" in trace.calls[inside[0].end].name
        if len(inside) == 1 and len(inside[0].layers) > 1 and inside[0].end <= span.last and not is_gate:
            innermost[id(inside[0])] = span
    residual = list(innermost.values())
    kinds = {type(span.module) for span in residual} - {nn.Sequential}
    chosen = [span for span, _ in candidates if span in residual or type(span.module) in kinds]
    for span, inside in candidates:
        layers = sum(len(group.layers) for group in inside)
        holds_block = any(span.first <= other.first and other.last <= span.last for other in chosen)
        if not isinstance(span.module, nn.Sequential) and 2 <= layers <= PLAIN_BLOCK_LAYERS and not holds_block:
            chosen.append(span)
    return chosen


def _named_blocks(trace: Trace, groups: list[_Group], override: str | list[str]) -> list[ModuleSpan]:
    patterns = [override] if isinstance(override, str) else override
    chosen = []
    for pattern in patterns:
        wanted = "" if pattern == "." else pattern
        spans = [span for span in trace.spans if fnmatchcase(span.path, wanted) and (span.path or not wanted)]
        if not spans:
            raise UserError(
                f"model.blocks is {pattern!r}, which no called module matches; allowed: names as in named_modules()"
            )
        if any(sign in pattern for sign in "*?["):  # `*` matches dots too, but what lies inside a match is not meant
            holds_layers = [s for s in spans if any(s.first <= g.last and g.first <= s.last for g in groups)]
            paths = [f"{s.path}." for s in holds_layers]
            spans = [s for s in holds_layers if not s.path.startswith(tuple(paths))] or spans
        for span in spans:
            if _covered(span, groups) is None:
                raise UserError(
                    f"model.blocks is {pattern!r}, but {span.path!r} cannot be a block; allowed: modules with "
                    "quantized layers that all data enters and leaves as one tensor"
                )
            chosen.append(span)
    return chosen


def _merge(groups: list[_Group], spans: list[ModuleSpan]) -> list[_Group]:
    for span in sorted(spans, key=lambda span: (span.first, -span.last)):
        inside = _covered(span, groups) or []
        if inside and inside[0].span is None:
            for other in inside[1:]:
                inside[0].join(other)
                groups.remove(other)
            inside[0].span = span
    return groups


def _elements(trace: Trace, cuts: list[int], groups: list[_Group]) -> list[Element]:
    elements, start = [], INPUT
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        stop = trace.output if following is None else _boundary(trace.calls, cuts, group, following)
        name = group.span.path if group.span and group.span.path else "+".join(group.layers) if not group.span else "."
        called = (call.product for call in trace.calls[start + 1 : stop + 1])
        products = tuple(dict.fromkeys(product for product in called if product is not None))
        elements.append(Element(name, tuple(group.layers), start, stop, products))
        start = stop
    return elements


def _boundary(calls: list[Call], cuts: list[int], group: _Group, following: _Group) -> int:
    """Choose the cut between two groups: what keeps the shape (ReLU, norm) stays with the group before.

    So does what selects: the largest of a window or of all points, a class token. Nothing reads the other values.
    """
    latest = following.first - 1
    if following.span is not None:
        latest = max(min(latest, following.span.first - 1), group.last)
    between = [cut for cut in cuts if group.last <= cut <= latest]
    if not between:
        between = [cut for cut in cuts if group.last <= cut < following.first][:1]
    earliest = group.span.last if group.span is not None else group.last
    choice = next((cut for cut in between if cut >= earliest), between[-1])
    behind = [cut for cut in between if cut > choice]
    choice = next((cut for cut in behind if _selects(calls[choice : cut + 1])), choice)
    for cut in behind:
        if cut > choice and calls[cut].form == calls[choice].form:
            choice = cut
        elif cut > choice:
            break
    return choice


def _selects(calls: list[Call]) -> bool:
    """Tell whether the last of these calls gives fewer values than the first, and one on the way selects."""
    before, after = (math.prod(call.form.at(2)) for call in (calls[0], calls[-1]) if call.form is not None)
    names = [call.name for call in calls[1:] if call.inputs]
    return after < before and any(name in SELECTIONS or "max_pool" in name for name in names)
