"""The names of DensePoint's published weights (github.com/Yochengliu/DensePoint), and ours for them."""

from typing import Any

from torch import Tensor, nn

# Module by module; what follows (`weight`, `bias`, `running_mean`, ...) is the same.
NAMES = {
    "SA_modules.0.mlps.0.pconv": "pool1.mlps.0.conv1",
    "SA_modules.0.mlps.0.bn": "pool1.mlps.0.bn1",
    "SA_modules.1.mlps.0.pconv": "pool2.mlps.0.conv1",
    "SA_modules.1.mlps.0.bn": "pool2.mlps.0.bn1",
    **{
        f"SA_modules.{number + 1}.mlps.0.{theirs}": f"conv{number}.{ours}"
        for number in (1, 2, 3)
        for theirs, ours in {
            "bn_cin": "before.0",
            "conv_phi": "phi",
            "bn_phi": "bn",
            "conv_psi": "psi",
            "bn_concat": "after.0",
        }.items()
    },
    "SA_modules.5.mlps.0.conv_avg": "pool3.mlp.conv1",
    "SA_modules.5.mlps.0.bn_avg": "pool3.mlp.bn1",
    "FC_layer.0.fc": "head.hidden.0.linear1",
    "FC_layer.0.bn.bn": "head.hidden.0.bn1",
    "FC_layer.2.fc": "head.hidden.1.linear1",
    "FC_layer.2.bn.bn": "head.hidden.1.bn1",
    "FC_layer.4.fc": "head.scores",
}


def accept_published_weights(network: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Rename published weights in a state dict in place; a hook before `load_state_dict`.

    A weight of another shape than the network's keeps its name, by which it is refused.
    """
    shapes = {key: value.shape for key, value in network.state_dict(prefix=prefix).items()}
    for key in [key for key in state if key.startswith(prefix)]:
        name, _, kind = key.removeprefix(prefix).rpartition(".")
        # The last layer sees a set of points as a line here, in the published network as an image.
        value = state[key].squeeze(3) if key.endswith("conv_avg.weight") else state[key]
        ours = f"{prefix}{NAMES.get(name)}.{kind}"
        if shapes.get(ours) == value.shape:
            state[ours] = value
            del state[key]
