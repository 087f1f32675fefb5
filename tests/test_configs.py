"""Every shipped YAML is read, its objects check themselves, and a short run goes through each architecture."""

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from e2e_helpers import _one_thread, make_images

from pack_ptq.callbacks import NoPacking
from pack_ptq.cli import build_parser, main
from pack_ptq.configs.shipped import config_file, listing, recipe_file
from pack_ptq.datamodules import DigitsData, ImageFolderData, ModelNet40Data, SolidsData
from pack_ptq.models import ModelSource
from pack_ptq.types import BITS, Recipe, ReconstructionSpec, TuningSpec

__all__ = ["_one_thread"]

NAMES = list(listing(recipes=False))
RECIPES = list(listing(recipes=True))
HEAVY = ("resnet50", "regnetx_3200m")
TRANSFORMERS = [f"{kind}_{size}" for kind in ("vit", "deit", "swin") for size in ("tiny", "small", "base")]
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
    for network in TRANSFORMERS:
        assert {f"imagenet/{network}_{bits}" for bits in ("w6a6", "w4a4", "w3a3")} <= set(NAMES)
    for network in ("pointnet", "densepoint"):
        assert {f"modelnet40/{network}_{bits}" for bits in ("w8a8", "w6a6", "w4a4", "w3a3")} <= set(NAMES)
    assert {"digits_w3a3", "digits_vit_w4a4", "solids_w4a4", "solids_parts_w4a4"} <= set(NAMES)


def chosen_by(*names: str) -> Any:
    """Give the instantiated settings of one configuration after the other."""
    parser = build_parser()
    arguments = [f"--config={config_file(name)}" for name in names]
    return parser.instantiate_classes(parser.parse_args(["quantize", *arguments])).quantize


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_read_and_checks(name):
    chosen = chosen_by(name)
    assert isinstance(chosen.model, ModelSource)
    assert isinstance(chosen.data, DigitsData | ImageFolderData | ModelNet40Data | SolidsData)
    assert isinstance(chosen.recipe, Recipe)
    title = name.rsplit("/", 1)[-1]
    assert f"w{chosen.recipe.weight.bits}a{chosen.recipe.activation.bits}" in title
    assert chosen.recipe.weight.bits in BITS
    assert (chosen.recipe.protocol == "all") == title.endswith("_all")


def test_recipes_of_the_comparison_are_there():
    names = {name.removeprefix("recipes/") for name in RECIPES}
    assert names >= {"rtn", "gptq", "adaround", "brecq", "qdrop", "pack_ptq_paper", "pack_ptq_release", "default"}
    assert names >= {"aiqvit", "pack_ptq_vit", "aiqvit_pack_ptq", "qdrop_vit", "noisyquant"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_only_the_method_and_states_it_whole(name):
    """So what the network's configuration says of the same class or key cannot leak into it."""
    assert recipe_file(name.removeprefix("recipes/")) == config_file(name)
    content = yaml.safe_load(Path(config_file(name)).read_text())
    for part in set(content) & {"scoring", "packing", "bits"}:
        chosen = getattr(chosen_by("digits_w3a3", name), part)
        assert f"{type(chosen).__module__.rpartition('.')[0]}.{type(chosen).__name__}" == content[part]["class_path"]
        assert set(content[part].get("init_args", {})) == set(inspect.signature(type(chosen)).parameters)
    assert set(content["recipe"]) >= {"layer_norm", "post_softmax", "post_gelu", "activation_noise", "bias_correction"}
    fit = content["recipe"]["reconstruction"]
    # Effort is the user's choice, and the penalty's weight belongs to the network.
    free = {"steps", "evaluations", "cache_bytes", "penalty_weight"}
    own = {field.name for field in fields(ReconstructionSpec)} - free
    assert set(fit) == {"steps", "start"} if fit.get("steps") == 0 else set(fit) == own
    last = content["recipe"]["tuning"]
    own = {field.name for field in fields(TuningSpec)} - {"steps"}
    assert set(last) == {"steps"} if last.get("steps") == 0 else set(last) == own


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("network", ["imagenet/mobilenetv2_w2a4", "cifar10/resnet20_w3a3_all"])
def test_a_recipe_replaces_the_method_and_keeps_the_network(network, name):
    alone, composed, other = chosen_by(network), chosen_by(network, name), chosen_by("digits_w3a3", name)
    assert (composed.recipe.weight, composed.recipe.protocol) == (alone.recipe.weight, alone.recipe.protocol)
    assert (composed.model.name, composed.data.batch_size) == (alone.model.name, alone.data.batch_size)
    fits = composed.recipe.reconstruction, other.recipe.reconstruction
    own = alone.recipe.reconstruction
    steps = 0 if fits[1].steps == 0 else own.steps
    of_network = replace(fits[1], penalty_weight=own.penalty_weight, steps=steps)
    assert fits[0] == of_network or composed.recipe.steps == other.recipe.steps == 0
    steps = 0 if other.recipe.tuning_steps == 0 else alone.recipe.tuning.steps
    assert composed.recipe.tuning == replace(other.recipe.tuning, steps=steps)
    assert (type(composed.packing), composed.packing.__dict__) == (type(other.packing), other.packing.__dict__)


@pytest.mark.parametrize("name", RECIPES)
def test_steps_that_a_configuration_sets_hold_behind_a_recipe_unless_its_method_has_none(name):
    alone, composed = chosen_by("digits_w3a3").recipe, chosen_by("digits_w3a3", name).recipe
    assert (alone.steps, alone.tuning_steps) == (200, 150)
    assert (composed.steps, composed.tuning_steps) == (
        200 * (name.removeprefix("recipes/") not in ("rtn", "gptq", "noisyquant")),
        150 * (name.removeprefix("recipes/") in ("fast", "default", "mixed", "best")),
    )


def test_each_recipe_has_the_parts_of_its_own_method():
    chosen = {name: chosen_by("digits_w3a3", name).recipe for name in RECIPES}
    corrected = {name for name, recipe in chosen.items() if recipe.bias_correction != "none"}
    assert corrected == {f"recipes/{name}" for name in ("fast", "default", "mixed", "best")}
    assert [name for name, recipe in chosen.items() if recipe.reconstruction.start == "gptq"] == ["recipes/gptq"]


def test_the_default_recipe_is_what_is_done_if_nothing_is_set():
    chosen = chosen_by("imagenet/mobilenetv2_w2a4", "recipes/default")
    assert chosen.recipe.bias_correction == Recipe().bias_correction
    assert chosen.recipe.reconstruction == ReconstructionSpec(penalty_weight=0.1)
    assert chosen.recipe.tuning == TuningSpec()
    assert type(chosen.packing) is NoPacking
    assert (chosen.recipe.steps, chosen.recipe.tuning_steps) == (Recipe().steps, Recipe().tuning_steps)


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_every_recipe_on_digits(name, tmp_path):
    recipe = yaml.safe_load(Path(config_file(name)).read_text())["recipe"]
    fit = recipe["reconstruction"]
    steps = [] if fit.get("steps") == 0 else ["--recipe.reconstruction.steps=2"]
    is_compensated = fit.get("low_rank", {}).get("search_steps", 0) > 0
    if is_compensated:
        steps += [f"--recipe.reconstruction.low_rank.{key}=2" for key in ("search_steps", "fit_steps")]
    is_tuned = name in ("recipes/fast", "recipes/default", "recipes/mixed", "recipes/best")
    last = ["--recipe.tuning.steps=2"] if is_tuned else []
    short = [*steps, *last, "--data.init_args.num_calibration=64"]
    main(["quantize", "--config", "digits_w3a3", "--config", name, *short, f"--run_dir={tmp_path / 'run'}"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    expected = {2, 4, 6} if fit.get("granularity") == "layer" else {2} if steps else {0}
    expected |= {6} if is_compensated else set()  # in the head, which is linear
    assert {unit["steps"] for unit in report["reconstruction"]} == expected, "of single layers, in all"
    assert (report["tuning"] is not None) == is_tuned
    if not steps and recipe["activation_noise"] == "none":
        is_nearest = report["fidelity"]["quantized"] == report["fidelity"]["rounded_to_nearest"]
        assert is_nearest == (fit["start"] == "weights")
        if fit["start"] == "weights":
            assert report["metrics"]["quantized"] == report["metrics"]["rounded_to_nearest"]


def test_noisyquant_on_the_embedded_transformer(tmp_path):
    short = ["--data.init_args.num_calibration=64", f"--run_dir={tmp_path / 'run'}"]
    main(["quantize", "--config", "digits_vit_w4a4", "--config", "recipes/noisyquant", *short])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    packs = [torch.load(path, weights_only=True)["layers"] for path in (tmp_path / "run" / "packs").iterdir()]
    noisy = {path for layers in packs for path, layer in layers.items() if layer["noise"] is not None}
    assert len(noisy) > 5
    assert "patch_embed.proj" not in noisy
    assert report["metrics"]["quantized"]["top1"] > 90
    assert report["reconstruction"] != []


@pytest.mark.parametrize("name", NAMES + RECIPES)
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


def is_transformer(name: str) -> bool:
    return name.rsplit("/", 1)[-1].rpartition("_w")[0] in TRANSFORMERS


def of_one_width(name: str) -> bool:
    return name.startswith(("cifar10/", "imagenet/")) and (name.endswith("w4a4") or not is_transformer(name))


@pytest.mark.parametrize("name", [marked(name) for name in NAMES if of_one_width(name)])
def test_two_steps_per_pack_with_random_weights(name, images, tmp_path, capsys):
    *data, root = images
    of_imagenet = name.startswith("imagenet/")
    extra = ["--model.pretrained=false", "--data.init_args.image_size=64"] if of_imagenet else []
    extra += ["--model.init_args.img_size=64"] if is_transformer(name) else []
    classes = f"--data.init_args.classes={root}/{'classes' if of_imagenet else 'ten'}.txt"
    # The search for weight ranges would take most of the time, and is the same for every network.
    short = [
        "--recipe.reconstruction.steps=2",
        "--recipe.reconstruction.batch_size=4",
        "--recipe.tuning.steps=1",
        "--recipe.tuning.batch_size=4",
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


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    """Give a root of ModelNet40 as resampled text, with a few small objects of two classes."""
    root, random = tmp_path_factory.mktemp("modelnet40"), np.random.RandomState(0)
    shapes = [f"{name}_{number:04}" for name in ("chair", "tv_stand") for number in range(2)]
    for shape in shapes:
        (root / shape[:-5]).mkdir(exist_ok=True)
        np.savetxt(root / shape[:-5] / f"{shape}.txt", random.standard_normal((40, 6)), delimiter=",")
    for split in ("train", "test"):
        (root / f"modelnet40_{split}.txt").write_text("\n".join(shapes))
    return root


@pytest.mark.parametrize("name", ["modelnet40/pointnet_w4a4", "modelnet40/densepoint_w3a3"])
def test_two_steps_per_pack_on_objects_with_random_weights(name, objects, tmp_path):
    small = {"root": objects, "num_points": 32, "num_calibration": 4, "batch_size": 4}
    keys = [f"--data.init_args.{key}={value}" for key, value in small.items()]
    keys += [f"--recipe.{part}.batch_size=4" for part in ("reconstruction", "tuning")]
    keys += ["--recipe.reconstruction.steps=2", "--recipe.tuning.steps=1", "--recipe.weight.observer=minmax"]
    main(["quantize", "--config", name, *keys, f"--run_dir={tmp_path / 'run'}"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["metrics"]["quantized"]) == {"overall", "mean_class"}
    assert report["metrics"]["num_samples"] == 4
    assert report["left_out"] == []
    assert all(result["steps"] == 2 for result in report["reconstruction"])
