"""What every model source gives."""

from dataclasses import dataclass

from torch import nn

from pack_ptq.types import Preprocessing


@dataclass(frozen=True)
class LoadedModel:
    """A network and how it wants its images.

    Attributes:
        network: After `load_model`: float32, in eval mode, no parameter asks for gradients.
        preprocessing: Without it the data alone decide.
    """

    network: nn.Module
    preprocessing: Preprocessing | None = None
