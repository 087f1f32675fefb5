"""HDF5 files for tests, also where h5py is not installed."""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WriteHdf5 = Callable[..., Path]


class StandIn:
    """What the readers use of `h5py.File`, over an .npz file."""

    def __init__(self, path: Path, mode: str = "r") -> None:
        try:
            self.arrays = np.load(path)
        except (ValueError, EOFError) as error:
            raise OSError(f"Unable to open file {path}") from error

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *failure: object) -> None:
        self.arrays.close()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


@pytest.fixture
def write_hdf5(monkeypatch: pytest.MonkeyPatch) -> WriteHdf5:
    """Give a writer of real HDF5 files if h5py is there, else of files for a stand-in that takes its place."""
    real = importlib.util.find_spec("h5py") is not None
    if not real:
        module = types.ModuleType("h5py")
        module.File = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "h5py", module)

    def write(path: Path, **arrays: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not real:
            with path.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            return path
        import h5py

        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array)
        return path

    return write
