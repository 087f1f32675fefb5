"""Point operators that are one call for the graph tracer, however many torch calls they make."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

P = ParamSpec("P")


def one_call(operator: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Make a function one operation for a `TorchFunctionMode`, as a layer of torch itself is.

    Farthest-point sampling alone makes thousands of calls, each of which would be recorded and replayed.

    Args:
        operator: Takes a tensor first and gives a tensor; what it calls is hidden from the mode.
    """

    @wraps(operator)
    def call(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if has_torch_function_unary(x):
            return handle_torch_function(call, (x,), x, *args, **kwargs)
        return operator(x, *args, **kwargs)

    return call
