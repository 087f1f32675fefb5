"""What the end-to-end tests share: small networks and data, and ways to run the command line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pack_ptq.cli import main
from pack_ptq.datamodules import DigitsData

HERE = Path(__file__).parent


class TinyNet(nn.Module):
    """Five layers, 10 scores, for 3 x 8 x 8 images."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.block1 = TinyBlock()
        self.block2 = TinyBlock()
        self.head = nn.Linear(6, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(torch.relu(self.norm(self.stem(x)))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class GivesTuple(TinyNet):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class GivesFeatureMap(TinyNet):
    def forward(self, x: Tensor) -> Any:
        return self.features(x)


class GivesTwoScores(TinyNet):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[:, :2]


class NaNWeight(TinyNet):
    def __init__(self, channels: int = 3) -> None:
        super().__init__(channels)
        self.block1.b.weight.data[0, 0, 0, 0] = float("nan")


class NaNActivation(TinyNet):
    def forward(self, x: Tensor) -> Any:
        y = self.block1(torch.relu(self.norm(self.stem(x))))
        return self.head(self.block2(y / (y * 0)).mean((2, 3)))


class LateNaN(TinyNet):
    """Its second block gets NaN where the mean of a sample is far above that of digits or noise."""

    def forward(self, x: Tensor) -> Any:
        y = self.block1(torch.relu(self.norm(self.stem(x))))
        y = y * torch.where(x.mean((1, 2, 3), keepdim=True) > 50, float("nan"), 1.0)
        return self.head(self.block2(y).mean((2, 3)))


class OddDigits(DigitsData):
    """Digits with 499 test samples, and with one hot calibration sample at `hot`."""

    def __init__(self, num_calibration: int = 101, batch_size: int = 16, hot: int | None = None) -> None:
        super().__init__(num_calibration, batch_size)
        self.hot = hot

    def calibration_dataset(self) -> Dataset:
        dataset: Any = super().calibration_dataset()
        if self.hot is not None:
            dataset.tensors[0][self.hot] = 100.0
        return dataset

    def test_dataset(self) -> Dataset:
        return Subset(super().test_dataset(), range(499))

    @property
    def augments(self) -> bool:
        return True

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Add some noise."""
        return inputs + 0.05 * torch.randn(inputs.shape, generator=generator)


def environment(**extra: str) -> dict[str, str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **extra}


def cli(*arguments: object, code: int = 0, timeout: float = 120, **extra: str) -> subprocess.CompletedProcess:
    """Run `python -m pack_ptq` in a process of its own."""
    command = [sys.executable, "-m", "pack_ptq", *map(str, arguments)]
    done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Run the command line in this process, and give the one message with which it refuses."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("pack-ptq: ")
    assert message.count("\n") == 1, message
    return message


def packs_of(run_dir: Path) -> dict[str, Any]:
    """Give the content of all pack files, without the seconds they took."""
    found = {}
    for path in sorted((run_dir / "packs").glob("*.pt")):
        found[path.name] = torch.load(path, weights_only=True)
        del found[path.name]["result"]["seconds"]
    assert found
    return found


def assert_same(a: Any, b: Any) -> None:
    """Compare nested containers, tensors bit for bit."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def make_images(folder: Path, per_class: int, size: int = 16, classes: int = 2) -> Path:
    """Write PNG images of noise into one folder a class."""
    generator = torch.Generator().manual_seed(len(folder.name))
    for label in range(classes):
        place = folder / f"class{label:03d}"
        place.mkdir(parents=True)
        for index in range(per_class):
            pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """The machine's cores are for other processes; and no sum, also of a module's fixtures, depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
