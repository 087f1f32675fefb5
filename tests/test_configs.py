"""Every shipped YAML is read, its objects check themselves, and a short run goes through each architecture."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from e2e_helpers import _one_thread, make_images

from pack_ptq.cli import build_parser, config_file, main
from pack_ptq.datamodules import DigitsData, ImageFolderData
from pack_ptq.models import ModelSource
from pack_ptq.types import BITS, Recipe

__all__ = ["_one_thread"]

ROOT = Path(str(files("pack_ptq.configs")))
NAMES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))
HEAVY = ("resnet50", "regnetx_3200m")
ONE_OF_EACH = ("_w2a4", "cifar10/resnet20_w3a3")  # the others differ in bits only


def test_all_networks_of_the_plan_are_there():
    for network in (
        "resnet18",
        "resnet50",
        "mobilenetv2",
        "regnetx_600m",
        "regnetx_3200m",
        "mnasnet",
        "efficientnet_lite0",
    ):
        assert {f"imagenet/{network}_{bits}" for bits in ("w4a4", "w3a3", "w2a4")} <= set(NAMES)
    assert "digits_w3a3" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_read_and_checks(name):
    parser = build_parser()
    chosen = parser.instantiate_classes(parser.parse_args(["quantize", "--config", config_file(name)])).quantize
    assert isinstance(chosen.model, ModelSource)
    assert isinstance(chosen.data, DigitsData | ImageFolderData)
    assert isinstance(chosen.recipe, Recipe)
    title = name.rsplit("/", 1)[-1]
    assert f"w{chosen.recipe.weight.bits}a{chosen.recipe.activation.bits}" in title
    assert chosen.recipe.weight.bits in BITS
    assert (chosen.recipe.protocol == "all") == title.endswith("_all")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_begins_with_its_description(name):
    first = Path(config_file(name)).read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Arguments that put a few small images in the place of a data set."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "calibration", 4, size=64, classes=2)
    make_images(root / "test", 2, size=64, classes=2)
    (root / "classes.txt").write_text("".join(f"class{i:03d}\n" for i in range(1000)))
    (root / "ten.txt").write_text("".join(f"class{i:03d}\n" for i in range(10)))
    paths = [f"--data.init_args.{part}_dir={root / part}" for part in ("calibration", "test")]
    small = {"num_calibration": 8, "batch_size": 4, "num_workers": 0}
    return [*paths, *[f"--data.init_args.{key}={value}" for key, value in small.items()], str(root)]


def marked(name: str) -> object:
    is_fast = name.endswith(ONE_OF_EACH) and not any(part in name for part in HEAVY)
    return name if is_fast else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in NAMES if name != "digits_w3a3"])
def test_two_steps_per_pack_with_random_weights(name, images, tmp_path, capsys):
    *data, root = images
    of_imagenet = name.startswith("imagenet/")
    extra = ["--model.pretrained=false", "--data.init_args.image_size=64"] if of_imagenet else []
    classes = f"--data.init_args.classes={root}/{'classes' if of_imagenet else 'ten'}.txt"
    # The search for weight ranges would take most of the time, and is the same for every network.
    short = [
        "--recipe.reconstruction.steps=2",
        "--recipe.reconstruction.batch_size=4",
        "--recipe.weight.observer=minmax",
    ]
    main(["quantize", "--config", name, *data, classes, *extra, *short, f"--run_dir={tmp_path / 'run'}"])
    assert "rounded to nearest" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    config = yaml.safe_load(Path(config_file(name)).read_text())
    assert report["metrics"]["num_samples"] == 4
    assert report["left_out"] == []
    assert report["bits"]["weight_average"] >= config["recipe"]["weight"]["bits"]
    assert all(result["steps"] == 2 for result in report["reconstruction"])
    assert len(report["packs"]) >= 1
