"""Image folders: which images with which labels, and every refusal before work starts."""

import os
import re
import warnings
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms.functional import normalize, to_tensor

from pack_ptq.datamodules import ImageFolderData
from pack_ptq.errors import UserError
from pack_ptq.types import Preprocessing

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / os.environ.get("PACK_PTQ_ASSETS", "../shared/assets")
NETWORK = Preprocessing((16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def save(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes with 8 calibration and 4 test images each."""
    for number, name in enumerate(("cat", "dog", "emu")):
        for image in range(8):
            save(tmp_path / "calibration" / name / f"{image}.jpg", seed=number * 100 + image)
        for image in range(4):
            save(tmp_path / "test" / name / f"{image}.png", seed=1000 + number * 100 + image)
    return tmp_path


def make(folders: Path, **settings: object) -> ImageFolderData:
    arguments = {"num_calibration": 12, "batch_size": 4} | settings
    data = ImageFolderData(folders / "calibration", folders / "test", **arguments)  # type: ignore[arg-type]
    data.use_preprocessing(NETWORK)
    return data


def write_classes(folders: Path, names: str) -> Path:
    file = folders / "classes.txt"
    file.write_text(names)
    return file


def refusal(data: ImageFolderData) -> str:
    with pytest.raises(UserError) as caught:
        data.check()
    return str(caught.value)


def chosen(data: ImageFolderData) -> list[str]:
    return [path for path, _ in data.calibration_files]


def test_constructor_leaves_the_disk_alone() -> None:
    data = ImageFolderData("/nowhere/calibration", "/nowhere/test", classes="/nowhere/classes.txt")
    assert refusal(data).startswith("data.init_args.image_size")


def test_config_gives_the_same_as_the_constructor(folders: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageFolderData, "data", required=True)
    config = parser.parse_object(
        {
            "data": {
                "class_path": "pack_ptq.datamodules.ImageFolderData",
                "init_args": {
                    "calibration_dir": str(folders / "calibration"),
                    "test_dir": str(folders / "test"),
                    "mean": [0.5, 0.4, 0.3],
                    "num_calibration": 12,
                    "batch_size": 4,
                },
            }
        }
    )
    data = parser.instantiate_classes(config).data
    data.use_preprocessing(NETWORK)
    assert data.fingerprint() == make(folders).fingerprint()
    # A run folder holds the config as text, and must start the same run again.
    again = parser.instantiate_classes(parser.parse_string(parser.dump(config))).data
    again.use_preprocessing(NETWORK)
    assert again.fingerprint() == data.fingerprint()


def test_samples_are_the_files_with_the_labels_of_their_folders(folders: Path) -> None:
    data = make(folders)
    data.check()
    dataset = data.test_dataset()
    assert [label for _, label in dataset] == [0] * 4 + [1] * 4 + [2] * 4
    with Image.open(folders / "test" / "dog" / "2.png") as image:
        # 20 x 16 pixels: only the centre crop is left to do.
        expected = normalize(to_tensor(image.crop((2, 0, 18, 16))), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(dataset[6][0], expected)
    for path, label in data.calibration_files:
        assert Path(path).parent.name == ("cat", "dog", "emu")[label]
    batches = list(data.test_dataloader())
    assert [tuple(batch.shape) for batch, _ in batches] == [(4, 3, 16, 16)] * 3
    torch.testing.assert_close(batches[1][0], default_collate([dataset[index][0] for index in range(4, 8)]))


def test_workers_give_the_same_batches(folders: Path) -> None:
    alone, helped = (torch.cat([batch for batch, _ in make(folders, num_workers=n).val_dataloader()]) for n in (0, 1))
    assert torch.equal(alone, helped)


def test_draw_is_seeded_without_replacement_and_not_by_class(folders: Path) -> None:
    first, again, other = make(folders), make(folders), make(folders, calibration_seed=1)
    assert chosen(first) == chosen(again) != chosen(other)
    assert len(set(chosen(first))) == 12
    assert len({label for _, label in first.calibration_files[:6]}) > 1
    assert chosen(make(folders, num_calibration=5)) == chosen(first)[:5]
    everything = {str(path) for path in (folders / "calibration").rglob("*.jpg")}
    assert set(chosen(make(folders, num_calibration=None))) == everything
    torch.manual_seed(3)
    assert chosen(make(folders)) == chosen(first)


def test_draws_of_many_seeds_cover_all_images_evenly(folders: Path) -> None:
    counts: dict[str, int] = {}
    for seed in range(200):
        for path in chosen(make(folders, calibration_seed=seed, num_calibration=6)):
            counts[path] = counts.get(path, 0) + 1
    # Each of the 24 images is expected 50 times with a deviation of 6.1.
    assert len(counts) == 24
    assert all(50 - 5 * 6.1 < count < 50 + 5 * 6.1 for count in counts.values())


def test_fewer_images_than_asked_are_all_used_with_one_warning(folders: Path) -> None:
    data = make(folders, num_calibration=1024)
    with pytest.warns(
        UserWarning, match=r"num_calibration is 1024, but .*calibration holds 24 usable images"
    ) as caught:
        data.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.calibration_dataset()) == 24
    assert len([warning for warning in caught if "num_calibration" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(folders, num_calibration=None).check()


def test_flat_calibration_folder_is_unlabelled(folders: Path) -> None:
    for number in range(6):
        save(folders / "calibration2" / f"{number}.jpg", seed=number)
    (folders / "calibration2" / "notes.txt").write_text("no image")
    data = make(folders, num_calibration=6)
    data.calibration_dir = folders / "calibration2"
    data.check()
    assert [label for _, label in data.calibration_dataset()] == [-1] * 6


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png")]
)
def test_other_colours_become_rgb(folders: Path, mode: str, suffix: str) -> None:
    path = save(folders / "test" / "cat" / f"00.{suffix}", mode=mode, size=(16, 16))
    data = make(folders)
    data.check()
    with Image.open(path) as image:
        expected = normalize(to_tensor(image.convert("RGB")), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    index = [name for name, _ in data.test_files].index(str(path))
    torch.testing.assert_close(data.test_dataset()[index][0], expected)


def test_small_images_are_enlarged(folders: Path) -> None:
    save(folders / "test" / "cat" / "00.png", size=(5, 3))
    assert make(folders).test_dataset()[1][0].shape == (3, 16, 16)


def test_labels_come_from_the_classes_file(folders: Path) -> None:
    names = "zebra\ndog\nant\nemu\n\ncat\n"
    data = make(folders, classes=write_classes(folders, names))
    data.check()
    assert {Path(path).parent.name: label for path, label in data.test_files} == {"cat": 4, "dog": 1, "emu": 3}
    assert {label for _, label in data.calibration_files} <= {1, 3, 4}
    data.check_output(torch.zeros(2, 5))


def test_metrics_and_output_follow_the_classes(folders: Path) -> None:
    assert set(make(folders).metrics()) == {"top1"}
    classes = write_classes(folders, "cat\ndog\nemu\n" + "\n".join(f"other{number}" for number in range(7)))
    assert set(make(folders, classes=classes).metrics()) == {"top1", "top5"}
    with pytest.raises(UserError, match=r"1000 scores per sample; allowed: 3, one a class; data\.init_args\.classes"):
        make(folders).check_output(torch.zeros(2, 1000))


def test_unknown_classes_are_refused_by_name(folders: Path) -> None:
    message = refusal(make(folders, classes=write_classes(folders, "cat\nfox\n")))
    assert message.startswith(f"data.init_args.calibration_dir is '{folders / 'calibration'}'; allowed: sub-folders")
    assert f"data.init_args.classes ({folders / 'classes.txt'}), but not dog, emu" in message
    save(folders / "calibration" / "yak" / "0.jpg")
    assert f"data.init_args.test_dir ({folders / 'test'}), but not yak" in refusal(make(folders))


@pytest.mark.parametrize("content", [None, b"", b"cat\n", b"cat\ndog\ncat\n", b"\xff\xfe\x00cat"])
def test_bad_classes_files_are_refused(folders: Path, content: bytes | None) -> None:
    file = folders / "classes.txt"
    if content is not None:
        file.write_bytes(content)
    message = refusal(make(folders, classes=file))
    assert message.startswith(f"data.init_args.classes is '{file}'; allowed: a text file of two or more distinct class")


@pytest.mark.parametrize("name", ["calibration", "test"])
@pytest.mark.parametrize("state", ["missing", "empty", "a file", "empty classes"])
def test_bad_folders_are_refused(folders: Path, name: str, state: str) -> None:
    data, folder = make(folders, classes=write_classes(folders, "cat\ndog\nemu\n")), folders / "other"
    if state == "a file":
        folder.write_text("")
    elif state != "missing":
        (folder / ("cat" if state == "empty classes" else "")).mkdir(parents=True)
    setattr(data, f"{name}_dir", folder)
    message = refusal(data)
    assert message.startswith(
        f"data.init_args.{name}_dir is '{folder}'; allowed: a folder with one sub-folder per class"
    )
    assert ("directly in it" in message) == (name == "calibration")


def test_flat_test_folder_is_refused(folders: Path) -> None:
    data = make(folders)
    data.test_dir = folders / "calibration" / "cat"
    assert refusal(data).startswith(
        f"data.init_args.test_dir is '{data.test_dir}'; allowed: a folder with one sub-fold"
    )


def test_images_beside_class_folders_are_refused(folders: Path) -> None:
    save(folders / "calibration" / "stray.jpg")
    assert "class sub-folders or images directly in it, but not both" in refusal(make(folders))


def test_fewer_samples_than_a_batch_are_refused(folders: Path) -> None:
    message = refusal(make(folders, batch_size=16))
    assert message.startswith("data.init_args.batch_size is 16; allowed: 1 to 12, the number of calibration samples")
    assert "data.init_args.num_calibration" in message
    assert "data.init_args.calibration_dir" in refusal(make(folders, num_calibration=None, batch_size=25))


def test_missing_preprocessing_is_refused_before_reading(folders: Path) -> None:
    data = make(folders, image_size=16, std=[1.0, 1.0, 1.0])
    data.use_preprocessing(None)
    assert refusal(data).startswith("data.init_args.mean is None; allowed: a value of your own")


def test_corrupt_images_are_refused_by_name(folders: Path) -> None:
    bad = Path(chosen(make(folders))[3])
    truncate(bad)
    truncate(folders / "test" / "emu" / "3.png")
    message = refusal(make(folders))
    assert f"data.init_args.calibration_dir has 1 corrupt images of 12: {bad}" in message
    assert f"data.init_args.test_dir has 1 corrupt images of 12: {folders / 'test' / 'emu' / '3.png'}" in message
    assert "--data.init_args.on_corrupt skip" in message


def test_only_the_first_corrupt_images_are_named(folders: Path) -> None:
    for path in (folders / "test").rglob("*.png"):
        truncate(path)
    message = refusal(make(folders))
    assert len(re.findall(r"\d\.png", message)) == 5
    assert "and 7 more" in message


def test_unchosen_corrupt_calibration_images_do_no_harm(folders: Path) -> None:
    everything = {str(path) for path in (folders / "calibration").rglob("*.jpg")}
    for path in everything - set(chosen(make(folders))):
        truncate(Path(path))
    make(folders).check()


def test_skipping_draws_others_and_says_how_many(folders: Path) -> None:
    intended = chosen(make(folders, num_calibration=13))
    truncate(Path(intended[3]))
    truncate(folders / "test" / "dog" / "0.png")
    data = make(folders, on_corrupt="skip")
    with pytest.warns(UserWarning, match="1 corrupt images are left out") as caught:
        data.check()
    messages = [str(warning.message) for warning in caught if "corrupt" in str(warning.message)]
    assert [message.split(":")[0] for message in messages] == [
        "data.init_args.calibration_dir",
        "data.init_args.test_dir",
    ]
    assert chosen(data) == intended[:3] + intended[4:]
    assert [label for _, label in data.test_dataset()] == [0] * 4 + [1] * 3 + [2] * 4


def test_skipping_every_test_image_is_refused(folders: Path) -> None:
    for path in (folders / "test").rglob("*.png"):
        truncate(path)
    with pytest.warns(UserWarning, match="12 corrupt images"):
        assert refusal(make(folders, on_corrupt="skip")) == "data has 0 test samples; allowed: 1 or more"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [("num_calibration", 0, "1 or more, or null"), ("on_corrupt", "keep", "refuse or skip")],
)
def test_settings_out_of_range_are_refused(folders: Path, key: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"data\.init_args\.{key} is {value!r}; allowed: {allowed}"):
        make(folders, **{key: value})


def test_fingerprint_knows_what_matters(folders: Path) -> None:
    first = make(folders).fingerprint()
    assert make(folders, batch_size=3, num_workers=1).fingerprint() == first
    moved = folders.rename(folders.parent / "moved")
    assert make(moved).fingerprint() == first
    others = [
        make(moved, calibration_seed=1),
        make(moved, num_calibration=11),
        make(moved, image_size=15),
        make(moved, classes=write_classes(moved, "dog\ncat\nemu\n")),
    ]
    digests = [first] + [data.fingerprint() for data in others]
    save(Path(chosen(make(moved))[0]), seed=77)
    digests.append(make(moved).fingerprint())
    save(moved / "test" / "cat" / "9.png")
    digests.append(make(moved).fingerprint())
    assert len(set(digests)) == len(digests)


def test_real_folders_that_lack_classes() -> None:
    folder = ASSETS / "imagenet"
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}")
    data = ImageFolderData(folder / "calibration", folder / "val", folder / "classes.txt", num_calibration=64)
    data.use_preprocessing(Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3))
    names = (folder / "classes.txt").read_text().split()
    assert len(data.test_dataset()) == 1300
    assert len({label for _, label in data.test_files}) == 725
    assert all(names[label] == Path(path).parent.name for path, label in data.test_files + data.calibration_files)
    data.check_output(torch.zeros(1, 1000))
    batch, labels = next(iter(data.val_dataloader()))
    assert batch.shape == (64, 3, 64, 64)
    assert labels.unique().numel() == 64
