"""Keys that a recipe goes before: every way to give them, and only those whose value differs."""

import pytest

from pack_ptq.overridden import in_words, overridden

RECIPE = {
    "recipe": {"reconstruction": {"steps": 0, "rounding_lr": "7e-3", "beta": [20.0, 2.0], "bias_lr": None}},
    "packing": {"class_path": "pack_ptq.callbacks.NoPacking"},
}
STEPS = {"recipe.reconstruction.steps": {"stated": 0, "given": 60}}
PACKING = "packing.class_path"
HESSIAN = {PACKING: {"stated": "pack_ptq.callbacks.NoPacking", "given": "pack_ptq.callbacks.HessianPacking"}}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["--recipe.reconstruction.steps", "60"], STEPS),
        (["--recipe.reconstruction.steps=60"], STEPS),
        (["--recipe.reconstruction.steps=1", "--recipe.reconstruction.steps=60"], STEPS),
        (['--recipe.reconstruction={"steps": 60}'], STEPS),
        (["--packing.class_path=pack_ptq.callbacks.HessianPacking"], HESSIAN),
        (["--packing", "pack_ptq.callbacks.HessianPacking"], HESSIAN),
        (["--packing", "NoPacking"], {}),
        (["--packing.class_path=HessianPacking"], {PACKING: HESSIAN[PACKING] | {"given": "HessianPacking"}}),
        (["--recipe.reconstruction.steps=0"], {}),
        (["--recipe.reconstruction.rounding_lr=0.007"], {}),
        (["--recipe.reconstruction.beta=[20, 2]"], {}),
        (["--recipe.reconstruction.bias_lr=null"], {}),
        (["--recipe.reconstruction.batch_size=8", "--config", "digits_w3a3", "--model.blocks=*.layer"], {}),
    ],
)
def test_given_keys_are_found_by_their_value(keys, expected) -> None:
    assert overridden(keys, RECIPE) == expected


def test_words_have_both_values() -> None:
    found = overridden(["--recipe.reconstruction.bias_lr=1e-3", "--recipe.reconstruction.steps=60"], RECIPE)
    assert in_words(found) == (
        "recipe.reconstruction.bias_lr null instead of 1e-3, recipe.reconstruction.steps 0 instead of 60"
    )
