"""Null for what may be null on the command line, and refused for what may not, there and in files."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from pack_ptq import UserError
from pack_ptq.cli import parse
from pack_ptq.null_keys import refuse_nulls, with_nulls
from pack_ptq.parse_errors import import_class
from pack_ptq.types import Recipe


def recipe_of(*arguments: str) -> Recipe:
    return parse(["quantize", "--config", "digits_w3a3", *arguments])[1]["recipe"]


@pytest.mark.parametrize("given", [["--recipe.reconstruction.steps", "null"], ["--recipe.reconstruction.steps=null"]])
def test_steps_are_the_budgets_again(given: list[str]) -> None:
    assert recipe_of().reconstruction.steps == 200
    recipe = recipe_of("--recipe.reconstruction.batch_size", "7", *given, "--recipe.reconstruction.evaluations=3")
    assert (recipe.reconstruction.steps, recipe.steps) == (None, 1000)
    assert (recipe.reconstruction.batch_size, recipe.reconstruction.evaluations) == (7, 3), "what is around it stays"
    assert recipe.tuning == recipe_of().tuning


def test_every_key_of_a_recipe_that_may_be_null() -> None:
    keys = ["reconstruction.curriculum", "reconstruction.bias_lr", "tuning.steps"]
    recipe = recipe_of(*[f"--recipe.{key}=0.5" for key in keys[:2]], *[f"--recipe.{key}=null" for key in keys])
    fit = recipe.reconstruction
    assert (fit.curriculum, fit.bias_lr, recipe.tuning.steps) == (None, None, None)
    assert fit.steps == 200


def test_later_values_win() -> None:
    key = "--recipe.reconstruction.steps"
    assert recipe_of(f"{key}=null", f"{key}=3").reconstruction.steps == 3
    assert recipe_of(f"{key}=3", f"{key}=null").reconstruction.steps is None


@pytest.mark.parametrize("key", ["reconstruction.batch_size", "weight.bits", "reconstruction.low_rank.fit_steps"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"recipe\.{key} is .*; allowed: int"):
        recipe_of(f"--recipe.{key}", "null")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"recipe": {"reconstruction": {"batch_size": None}}},
            "recipe.reconstruction.batch_size is 'null'; allowed: int",
        ),
        ({"recipe": {"protocol": None}}, "recipe.protocol is 'null'; allowed: first_last_8, "),
        ({"data": {"init_args": {"batch_size": None}}}, "data.init_args.batch_size is 'null'; allowed: int"),
        ({"hardware": {"devices": None}}, "hardware.devices is 'null'; allowed: int"),
    ],
)
def test_null_in_a_file_is_refused_before_work_starts(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = tmp_path / "null.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        recipe_of("--config", str(path))


class Taking:
    """Parameters whose null is fine: by its type, by its default, without a type."""

    def __init__(self, by_type: int | None, anything, by_default: str = None, number: int = 1) -> None:  # type: ignore[no-untyped-def, assignment] # noqa: RUF013
        """Take them."""


def test_null_stays_where_it_may_be() -> None:
    refuse_nulls(Taking, Namespace(by_type=None, anything=None, by_default=None, number=2))
    with pytest.raises(UserError, match=r"^data\.number is 'null'; allowed: int$"):
        refuse_nulls(Taking, Namespace(by_type=None, anything=None, by_default=None, number=None), ("data",))


def test_classes_are_found_inside_classes_too() -> None:
    assert import_class("argparse.Action.format_usage") is argparse.Action.format_usage
    assert import_class("argparse.Action.missing") is None


def test_other_arguments_stay_as_they_are() -> None:
    arguments = ["--scoring.init_args.num_samples", "null", "--run_dir=null", "null", "--recipe.reconstruction.steps"]
    assert with_nulls(arguments) == arguments
