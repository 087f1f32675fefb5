"""Which calls of a layer are the product with its weight, and nothing that this could not stand for."""

from pack_ptq.graph.trace import OPERATIONS, ModuleSpan, Source, Trace


def is_plain(span: ModuleSpan, trace: Trace) -> bool:
    """Tell whether a layer is one product of its weight and of its input, which at most is padded."""
    calls = trace.calls[span.first : span.last + 1]
    products = [call for call in calls if call.name in OPERATIONS]
    arguments = products[0].arguments if len(products) == 1 else None
    if arguments is None or arguments.get("weight") is not span.module.weight:
        return False
    x = arguments.get("input")
    padded = isinstance(x, Source) and x.value >= 0 and trace.calls[x.value].name == "pad"
    return isinstance(x, Source) and span.input in ((x.value, *trace.calls[x.value].inputs) if padded else (x.value,))


def ends_in_product(span: ModuleSpan, trace: Trace) -> bool:
    """Tell whether what a plain layer gives is its product itself, so that gains can go into its weight."""
    return is_plain(span, trace) and span.output is not None and trace.calls[span.output].name in OPERATIONS
