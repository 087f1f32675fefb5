"""Putting a state dict into a network, strictly."""

from torch import Tensor, nn

from pack_ptq.errors import refuse

SHOWN = 3


def fit_state_dict(network: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Load weights in place, cast to the network's own precision.

    A prefix that all keys share (`module.`, `_orig_mod.`, ...) is removed where the keys fit better without it.
    BatchNorm's `num_batches_tracked` may be missing, for inference never reads it.

    Args:
        network: Takes the weights.
        state: Tensors by key.
        file: Where they came from, for the message.

    Raises:
        UserError: Keys are missing or unexpected, or shapes or kinds of number differ.
    """
    own = network.state_dict()
    state = _without_prefix(state, set(own))
    wrong = {key: _difference(own[key], value) for key, value in state.items() if key in own}
    wrong = {key: difference for key, difference in wrong.items() if difference}
    fitting = {key: value for key, value in state.items() if key not in wrong}
    missing, unexpected = network.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in wrong and not key.endswith("num_batches_tracked")]
    complaints = [
        _count("missing", missing),
        _count("unexpected", unexpected),
        _count("different", [f"{key} {difference}" for key, difference in wrong.items()]),
    ]
    if any(complaints):
        found = "; ".join(filter(None, complaints))
        raise refuse("model.checkpoint", file, f"weights of this very network; this file does not fit it: {found}")


def _without_prefix(state: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    candidates = [state]
    while True:
        heads = {key.partition(".")[0] for key in candidates[-1]}
        stripped = {key.partition(".")[2]: value for key, value in candidates[-1].items()}
        if len(heads) > 1 or "" in stripped:
            return max(candidates, key=lambda candidate: len(known & candidate.keys()))
        candidates.append(stripped)


def _difference(own: Tensor, given: Tensor) -> str:
    if own.shape != given.shape:
        return f"{tuple(given.shape)} instead of {tuple(own.shape)}"
    # Codes of an already quantized network would load, but as nonsense.
    if own.is_floating_point() and not given.is_floating_point():
        return f"{given.dtype} instead of {own.dtype}"
    return ""


def _count(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    return f"{len(keys)} {kind} ({', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''})"
