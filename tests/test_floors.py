"""A floor of the house imports only lower floors; on one floor imports run in no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    ["errors", "types", "quant", "distributed", "current_folder", "allocator", "digests"],
    [
        "graph",
        "losses",
        "schedules",
        "packing",
        "bits",
        "bit_groups",
        "allocation",
        "budget",
        "mixed",
        "selections",
        "sensitivity",
        "hessian",
        "fisher",
        "calibration",
        "cache",
        "snapshot",
        "states",
        "views",
        "held_out",
    ],
    ["modules", "models", "matmul_precision", "trainers", "runs", "measurements"],
    ["callbacks", "datamodules", "configs"],
    [
        "activation_noise",
        "bias_correction",
        "column_rounding",
        "compensation",
        "fit_layers",
        "fit_part",
        "reconstruct",
        "reconstruct_unit",
        "tune",
        "workplace",
        "report",
        "describe",
        "pipeline",
        "api",
        "overridden",
        "comparison",
        "compare",
    ],
    ["parse_errors", "null_keys", "commands", "cli", "__main__"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
TORCH_ONLY = {"quant": {"torch"}, "graph": {"torch", "torchvision"}, "bits": set(), "losses": {"torch"}}


def source_files() -> dict[str, Path]:
    """Give every file of the package by its dotted name; three folders are installed from the top level."""
    files = {}
    for folder in ("pack_ptq", "callbacks", "datamodules", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "pack_ptq" else ("pack_ptq", *parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(path: Path, files: dict[str, Path]) -> set[str]:
    """Give the dotted names that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in files else str(node.module) for name in whole}
    return names


def room(name: str) -> str:
    return name.split(".")[1]


FILES = source_files()
IMPORTS = {name: imports(path, FILES) for name, path in FILES.items()}
OURS = {name: {i for i in found if i.startswith("pack_ptq.")} for name, found in IMPORTS.items() if name != "pack_ptq"}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in OURS} == set(FLOOR_OF)


def test_no_room_imports_the_package_itself() -> None:
    assert [name for name, found in IMPORTS.items() if "pack_ptq" in found] == []


@pytest.mark.parametrize("name", sorted(OURS))
def test_floor_imports_only_lower_floors_or_its_own(name: str) -> None:
    own = FLOOR_OF[room(name)]
    assert {i: FLOOR_OF[room(i)] for i in OURS[name] if FLOOR_OF[room(i)] > own} == {}


def test_rooms_import_in_no_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, found in OURS.items():
        rooms.setdefault(room(name), set()).update({room(i) for i in found} - {room(name)})
    try:
        list(TopologicalSorter(rooms).static_order())
    except CycleError as error:
        pytest.fail(f"rooms import in a circle: {error.args[1]}")


def test_files_import_in_no_circle() -> None:
    try:
        list(TopologicalSorter(OURS).static_order())
    except CycleError as error:
        pytest.fail(f"files import in a circle: {error.args[1]}")


@pytest.mark.parametrize("ground", sorted(TORCH_ONLY))
def test_ground_rooms_need_little_besides_torch(ground: str) -> None:
    heavy = {"torch", "torchvision", "timm", "lightning", "torchmetrics", "tensorboard", "jsonargparse", "sklearn"}
    found = {i.split(".")[0] for name, all_of_it in IMPORTS.items() if name != "pack_ptq" and room(name) == ground
             for i in all_of_it}  # fmt: skip
    assert found & heavy <= TORCH_ONLY[ground]
