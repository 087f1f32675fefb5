"""Image files as samples: read when asked for, as RGB."""

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import pil_loader

ImageFile = tuple[str, int]


class ImageFiles(Dataset):
    """Images with their labels.

    Grey, palette and transparent images become RGB by PIL's conversion.

    Args:
        files: Paths and labels, in the order of the samples.
        transform: From the RGB image to a tensor.
    """

    def __init__(self, files: Sequence[ImageFile], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Give the image as the transform's tensor, and its label."""
        path, label = self.files[index]
        return self.transform(pil_loader(path)), label
