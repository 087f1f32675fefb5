"""Find the shipped configurations of networks, and the recipes that compose with them."""

from importlib.resources import files
from pathlib import Path

import yaml

from pack_ptq.errors import UserError, refuse

ROOT = Path(str(files("pack_ptq.configs")))
RECIPES = "recipes"
OF_A_RECIPE = (
    *(f"recipe.{key}" for key in ("reconstruction", "tuning", "budget", "layer_norm", "post_softmax", "post_gelu")),
    "recipe.split_channels",
    "recipe.activation_noise",
    "recipe.bias_correction",
    *("scoring", "packing", "bits"),
)


def listing(recipes: bool) -> dict[str, str]:
    """Give the first comment line of every configuration by its name below `configs/`.

    Args:
        recipes: Whether to list the recipes instead of the configurations of networks.
    """
    found = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.yaml"))}
    return {
        name: path.read_text().splitlines()[0].lstrip("# ")
        for name, path in found.items()
        if name.startswith(f"{RECIPES}/") == recipes
    }


def config_file(name: str) -> str:
    """Give the file of a shipped configuration by its name, or of the user's own by its path.

    Raises:
        UserError: There is neither, or the file cannot be read.
    """
    if Path(name).is_file():
        _read("config", name)
        return name
    if not (ROOT / f"{name}.yaml").is_file():
        raise refuse("config", name, "a YAML file, or a name that `pack-ptq configs` lists")
    return str(ROOT / f"{name}.yaml")


def recipe_file(name: str) -> str:
    """Give the file of a recipe by its name below `configs/recipes`, or of the user's own by its path.

    Raises:
        UserError: There is neither, or it holds keys that are not of a recipe, such as the network's or its bits.
    """
    shipped = ROOT / RECIPES / f"{name}.yaml"
    path = Path(name) if Path(name).is_file() else shipped
    if not path.is_file():
        names = [listed.removeprefix(f"{RECIPES}/") for listed in listing(recipes=True)]
        raise refuse("recipes", name, f"none, {', '.join(names)}, or a YAML file")
    try:
        content = yaml.safe_load(_read("recipes", str(path)))
    except yaml.YAMLError as error:
        raise refuse("recipes", name, f"a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise refuse("recipes", name, f"a YAML file with keys of {', '.join(OF_A_RECIPE)}")
    if foreign := [key for key in _keys(content) if key not in OF_A_RECIPE]:
        raise UserError(f"recipes is {name!r}, which sets {foreign[0]}; allowed: only {', '.join(OF_A_RECIPE)}")
    return str(path)


def _read(key: str, name: str) -> str:
    try:
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise refuse(key, name, f"a readable YAML file ({reason})") from error


def _keys(content: dict[str, object]) -> list[str]:
    """Give the keys of the first level, and below `recipe` those of the second."""
    inner = content.get("recipe")
    below = [f"recipe.{key}" for key in inner] if isinstance(inner, dict) else []
    return [str(key) for key in content if key != "recipe" or not below] + below
