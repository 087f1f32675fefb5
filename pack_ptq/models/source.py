"""The user's choice of a network, and the one function that turns it into a network."""

from dataclasses import dataclass, field
from typing import Any

from pack_ptq.errors import refuse
from pack_ptq.models.checkpoint import load_checkpoint
from pack_ptq.models.class_path_source import build_class
from pack_ptq.models.finite import check_finite
from pack_ptq.models.fitting import fit_state_dict
from pack_ptq.models.loaded import LoadedModel
from pack_ptq.models.timm_source import build_timm
from pack_ptq.models.torchvision_source import build_torchvision
from pack_ptq.types import Record

LIBRARIES = {"timm": build_timm, "torchvision": build_torchvision}


@dataclass(frozen=True)
class ModelSource(Record):
    """Which network is quantized, and with which weights.

    Attributes:
        name: `timm/NAME` or `torchvision/NAME`.
        class_path: `package.module.Class` of the user's own network, instead of `name`.
        init_args: Keyword arguments of the network's constructor.
        pretrained: Take the library's own weights.
        checkpoint: File with weights: .safetensors, or .pth, .pt, .ckpt, .bin as torch saves them.
        blocks: Names of the blocks, or a pattern of them, in place of the block search.
    """

    name: str | None = None
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    blocks: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.class_path is None:
            raise refuse("model.name", None, "timm/NAME or torchvision/NAME, or model.class_path in its place")
        if self.name is not None and self.class_path is not None:
            raise refuse("model.name", self.name, f"none with model.class_path {self.class_path!r}")
        if self.name is not None:
            library, _, rest = self.name.partition("/")
            if library not in LIBRARIES or not rest:
                raise refuse("model.name", self.name, "timm/NAME or torchvision/NAME")
        if self.pretrained and self.checkpoint is not None:
            raise refuse("model.pretrained", True, f"false with model.checkpoint {self.checkpoint!r}")
        if self.pretrained and self.class_path is not None:
            raise refuse("model.pretrained", True, "false with model.class_path, which takes model.checkpoint")

    def load(self) -> LoadedModel:
        """Build the network as `load_model` does."""
        return load_model(self)


def load_model(source: ModelSource) -> LoadedModel:
    """Build the network, give it its weights and make it ready for quantization.

    Returns:
        The network in float32 and eval mode, without gradients, with its preprocessing.

    Raises:
        UserError: The name, class, arguments or checkpoint do not serve, or a weight is NaN or infinite.
    """
    # Reading the file comes first: a wrong one is refused before minutes go into a large network.
    state = None if source.checkpoint is None else load_checkpoint(source.checkpoint)
    loaded = _build(source)
    network = loaded.network.float()
    if source.checkpoint is not None and state is not None:
        fit_state_dict(network, state, source.checkpoint)
    check_finite(network)
    network.eval().requires_grad_(False)
    return loaded


def _build(source: ModelSource) -> LoadedModel:
    if source.name is None:
        assert source.class_path is not None
        return build_class(source.class_path, source.init_args)
    library, _, name = source.name.partition("/")
    return LIBRARIES[library](name, source.pretrained, source.init_args)
