"""Which images and classes there are on disk, in a fixed order; refusals name the folder's key."""

import os
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.image_files import ImageFile
from pack_ptq.errors import UserError, refuse

UNLABELLED = -1
NAMED = 5


def first_names(names: Sequence[str]) -> str:
    """Word a list for a message: its first five names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def read_classes(file: Path) -> list[str]:
    """Read the class names in label order, one a line; empty lines do not count.

    Raises:
        UserError: The file is missing or no text, or does not hold two or more distinct names.
    """
    refusal = refuse(
        f"{KEY}.classes", str(file), "a text file of two or more distinct class names in label order, one a line"
    )
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise refusal from error
    if len(names) < 2 or len(set(names)) < len(names):
        raise refusal
    return names


def class_folders(folder: Path, name: str) -> list[str]:
    """List the names of the sub-folders, sorted, hidden ones left out.

    Raises:
        UserError: The folder, which the user set as `name`, is missing or unreadable.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise _refuse_folder(folder, name) from error


def list_images(folder: Path, name: str, classes: list[str], source: str) -> list[ImageFile]:
    """List the images of a folder, sorted by path, each with its class's place in `classes`.

    A calibration folder may be flat: its images are unlabelled (-1) then.

    Args:
        folder: Where to look.
        name: `calibration_dir` or `test_dir`.
        classes: Class names in label order.
        source: Where the class names come from, for messages.

    Raises:
        UserError: The folder is missing, unreadable, or without images in the expected layout, or a sub-folder is not
            among the classes.
    """
    on_disk, labels = class_folders(folder, name), {label: place for place, label in enumerate(classes)}
    unknown = [found for found in on_disk if found not in labels]
    if unknown:
        raise refuse(f"{KEY}.{name}", str(folder), f"sub-folders named in {source}, but not {first_names(unknown)}")
    flat = _flat_images(folder) if name == "calibration_dir" else []
    if flat and on_disk:
        raise refuse(f"{KEY}.{name}", str(folder), "class sub-folders or images directly in it, but not both")
    files = make_dataset(str(folder), labels, extensions=IMG_EXTENSIONS, allow_empty=True) if on_disk else flat
    if not files:
        raise _refuse_folder(folder, name)
    return sorted(files)


def _flat_images(folder: Path) -> list[ImageFile]:
    found = (entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    return [(path, UNLABELLED) for path in found if has_file_allowed_extension(path, IMG_EXTENSIONS)]


def _refuse_folder(folder: Path, name: str) -> UserError:
    allowed = f"a folder with one sub-folder per class, with images ({', '.join(IMG_EXTENSIONS)})"
    if name == "calibration_dir":
        allowed += ", or with images directly in it"
    return refuse(f"{KEY}.{name}", str(folder), allowed)
