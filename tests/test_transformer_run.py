"""A vision transformer from a network to a report: norms, products and focusing, killed and resumed, loaded again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from e2e_helpers import _one_thread, assert_same, packs_of
from torch import nn

import pack_ptq
from pack_ptq import QuantizerSpec, Recipe, ReconstructionSpec, api
from pack_ptq.callbacks import NoPacking
from pack_ptq.datamodules import TensorData
from pack_ptq.graph.switch import switch
from pack_ptq.types import TuningSpec

__all__ = ["_one_thread"]

TOKENS, WIDTH, HEADS, BLOCKS = 5, 16, 2, 2
TIMES = {"seconds", "peak_memory_bytes", "reconstruction", "tuning"}
FILES = ("network.pt", "norms.pt", "calibration.pt")


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = timm.models.VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, embed_dim=WIDTH, depth=BLOCKS, num_heads=HEADS, num_classes=3
    )
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


def run(run_dir: Path) -> dict[str, Any]:
    inputs = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    data = TensorData(inputs, (inputs, torch.arange(16) % 3), batch_size=8)
    fit = ReconstructionSpec(steps=2, batch_size=8, bias_lr=0.1)
    recipe = Recipe(
        QuantizerSpec(4), QuantizerSpec(4, per_channel=False), reconstruction=fit,
        tuning=TuningSpec(steps=2, batch_size=8), layer_norm="reparameterised", post_softmax="focusing",
    )  # fmt: skip
    return pack_ptq.quantize(vit(), data, recipe, packing=NoPacking(), run_dir=run_dir)


def content(run_dir: Path) -> dict[str, Any]:
    """Give all that a run has decided, without the time it took."""
    report = json.loads((run_dir / "report.json").read_text())
    tuned = torch.load(run_dir / "tuned.pt", weights_only=True)
    del tuned["result"]["seconds"]
    tensors = {name: torch.load(run_dir / name, weights_only=True) for name in FILES}
    report = {key: value for key, value in report.items() if key not in TIMES}
    return {"packs": packs_of(run_dir), "tuned": tuned, "report": report, **tensors}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Give the folder of a run that nothing has stopped, and its network as the run left it."""
    prepared, original = [], api.prepare_for
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "prepare_for", lambda *args: prepared.append(original(*args)) or prepared[-1])
        run(run_dir)
    chain = prepared[0].chain
    switch(chain.operations, "hard", activations=True)
    return run_dir, chain.network


def kill_at_file(monkeypatch: pytest.MonkeyPatch, name: str, after: bool) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if after:
            real(source, target)
        if str(target).endswith(name):
            raise Killed
        if not after:
            real(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(
    ("name", "after"),
    [("calibration.pt", False), ("calibration.pt", True), ("packs/002.pt", True), ("tuned.pt", False)],
)
def test_killed_and_resumed_it_ends_as_if_it_had_never_stopped(
    name: str, after: bool, whole: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at_file(patch, name, after)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    assert (tmp_path / "run" / "norms.pt").exists()
    assert (tmp_path / "run" / name).exists() == after
    run(tmp_path / "run")
    assert_same(content(tmp_path / "run"), content(whole[0]))


@torch.no_grad()
def test_loaded_into_other_weights_it_gives_the_outputs_of_the_run(whole: tuple[Path, nn.Module]) -> None:
    run_dir, network = whole
    x = torch.randn(9, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pack_ptq.load(run_dir, network=vit())(x), network(x))
    assert torch.equal(pack_ptq.load(run_dir, network=vit(seed=1))(x), network(x))


def test_every_norm_was_moved_and_only_probabilities_focus(whole: tuple[Path, nn.Module]) -> None:
    norms = torch.load(whole[0] / "norms.pt", weights_only=True)
    assert list(norms) == [f"blocks.{i}.{name}" for i in range(BLOCKS) for name in ("norm1", "norm2")] + ["norm"]
    operands: dict[str, Any] = {}
    kinds = set()
    for pack in packs_of(whole[0]).values():
        operands |= {name: values["kind"] for name, values in pack["operands"].items()}
        kinds |= {layer["input"]["kind"] for layer in pack["layers"].values()}
    assert len(operands) == 4 * BLOCKS
    assert {name for name, kind in operands.items() if kind == "focusing"} == {
        f"blocks.{i}.attn.attention_0.probabilities" for i in range(BLOCKS)
    }
    assert kinds == {"uniform"}


def test_report_counts_the_operands_of_products(whole: tuple[Path, nn.Module]) -> None:
    layers = TOKENS * (WIDTH + WIDTH + WIDTH + 4 * WIDTH)  # qkv, proj, fc1, fc2
    products = 3 * TOKENS * WIDTH + HEADS * TOKENS**2
    inner, outer = BLOCKS * (layers + products), 16 * 16 + WIDTH
    bits = json.loads((whole[0] / "report.json").read_text())["bits"]
    assert bits["activation_average"] == pytest.approx((4 * inner + 8 * outer) / (inner + outer))
    plan = json.loads((whole[0] / "plan.json").read_text())["bits"]
    assert len(plan["activation"]) == len(plan["weight"]) + 4 * BLOCKS
