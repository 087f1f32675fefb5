"""Point-cloud benchmarks that lie in a folder in their original layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pack_ptq.datamodules.base import KEY
from pack_ptq.datamodules.point_clouds import PointCloudData
from pack_ptq.errors import UserError, refuse


@dataclass(eq=False)
class RootedPointData(PointCloudData):
    """Point clouds below one folder; a dataset in its own layout is a subclass without an `__init__`.

    Attributes:
        root: Where the dataset was unpacked; a string serves, too.
    """

    root: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = Path(self.root)

    def refuse_root(self, allowed: str) -> UserError:
        """Word a refusal of the folder, to be raised by the caller."""
        return refuse(f"{KEY}.root", str(self.root), allowed)

    def read_list(self, name: str, read: Callable[[str], object] = str.split) -> list:
        """Read a list that comes with the dataset, such as the names of a split.

        Args:
            name: Of the file below `root`.
            read: From its text to the list; words parted by blanks unless given.

        Raises:
            UserError: The file is missing or has another form.
        """
        path = self.root / name
        try:
            found = read(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.refuse_root(f"a folder with a readable {name} ({error})") from error
        if not isinstance(found, list) or not found:
            raise self.refuse_root(f"a folder whose {name} is a list of one name or more")
        return found
