import lightning as L
import pytest
import torch
from torch import nn

from pack_ptq.errors import UserError
from pack_ptq.models import CifarResNet, ModelSource
from pack_ptq.types import Preprocessing


class Lit(L.LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.model = nn.Linear(width, width)
        self.preprocessing = Preprocessing((4, 4), (0.5,), (0.5,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class OddPreprocessing(nn.Module):
    preprocessing = "resize"


class Picky(nn.Module):
    def __init__(self, width: int) -> None:
        raise RuntimeError(f"no layers of width {width}")


class NotANetwork:
    pass


def make_linear(width: int) -> nn.Module:
    return nn.Linear(width, 1)


def make_number() -> int:
    return 3


def message(name, **init_args):
    with pytest.raises(UserError) as refusal:
        ModelSource(class_path=name, init_args=init_args).load()
    return str(refusal.value)


def test_class_gives_network_and_preprocessing():
    loaded = ModelSource(class_path="pack_ptq.models.CifarResNet", init_args={"depth": 8}).load()
    assert isinstance(loaded.network, CifarResNet)
    assert loaded.preprocessing == CifarResNet.preprocessing


def test_lightning_module_serves():
    loaded = ModelSource(class_path=f"{__name__}.Lit", init_args={"width": 3}).load()
    assert isinstance(loaded.network, Lit)
    assert loaded.preprocessing == Preprocessing((4, 4), (0.5,), (0.5,))


def test_lightning_checkpoint_fits_its_class(tmp_path):
    module = Lit(width=3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    source = ModelSource(class_path=f"{__name__}.Lit", init_args={"width": 3}, checkpoint=str(tmp_path / "a.ckpt"))
    assert torch.equal(source.load().network.model.weight, module.model.weight)


def test_function_that_gives_a_network_serves():
    loaded = ModelSource(class_path=f"{__name__}.make_linear", init_args={"width": 5}).load()
    assert loaded.network.in_features == 5
    assert loaded.preprocessing is None


def test_other_preprocessing_is_left_alone():
    assert ModelSource(class_path=f"{__name__}.OddPreprocessing").load().preprocessing is None


def test_current_folder_is_importable(tmp_path, monkeypatch):
    (tmp_path / "my_nets_here.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [])
    loaded = ModelSource(class_path="my_nets_here.Net", init_args={"in_features": 2, "out_features": 3}).load()
    assert loaded.network.out_features == 3


@pytest.mark.parametrize("path", ["CifarResNet", "pack_ptq.models.", "a b.C", ".C"])
def test_malformed_path_is_refused(path):
    assert f"model.class_path is {path!r}; allowed: package.module.Class" in message(path)


def test_unknown_module_is_refused():
    text = message("no_such_package.Net")
    assert "model.class_path is 'no_such_package.Net'" in text
    assert "No module named 'no_such_package'" in text


def test_broken_module_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my_broken_nets.py").write_text("class Net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = message("my_broken_nets.Net")
    assert "model.class_path is 'my_broken_nets.Net'" in text
    assert "SyntaxError" in text


def test_missing_class_is_refused_with_near_ones():
    text = message("pack_ptq.models.CifarResnet")
    assert "model.class_path is 'pack_ptq.models.CifarResnet'" in text
    assert "CifarResNet" in text


@pytest.mark.parametrize("name", ["NotANetwork", "make_number"])
def test_what_is_no_network_is_refused(name):
    text = message(f"{__name__}.{name}")
    assert f"model.class_path is '{__name__}.{name}'" in text
    assert "torch.nn.Module" in text


def test_wrong_argument_is_refused_with_the_accepted_ones():
    text = message("pack_ptq.models.CifarResNet", deepth=20)
    assert "model.init_args is {'deepth': 20}" in text
    assert "depth, num_classes" in text


def test_missing_argument_is_refused_by_name():
    text = message(f"{__name__}.make_linear")
    assert "model.init_args is {}" in text
    assert "'width'" in text


def test_failing_constructor_is_refused_with_its_words():
    text = message(f"{__name__}.Picky", width=3)
    assert "model.init_args is {'width': 3}" in text
    assert "RuntimeError: no layers of width 3" in text


def test_own_refusals_of_a_class_pass_through():
    assert "model.init_args.depth is 21" in message("pack_ptq.models.CifarResNet", depth=21)
