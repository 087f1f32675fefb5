"""Classes and parts: samples, losses, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pack_ptq.datamodules.cloud import Cloud
from pack_ptq.datamodules.point_labels import ClassLabels, PartLabels
from pack_ptq.errors import UserError

CLASSES = ClassLabels(["bolt", "nut", "washer"])
PARTS = PartLabels({"bolt": 2, "nut": 1, "washer": 3})
POINTS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def cloud(label: int, parts: list | None = None) -> Cloud:
    return Cloud("a.txt", POINTS.numpy(), label, None if parts is None else np.array(parts))


def test_class_sample_and_metrics() -> None:
    assert CLASSES.sample(POINTS, 2, None) == (POINTS, 2)
    assert set(CLASSES.metrics()) == {"overall", "mean_class"}


def test_part_sample_has_the_category_one_hot_in_every_row() -> None:
    parts = torch.tensor([3, 4, 5, 3, 3])
    points, labels = PARTS.sample(POINTS, 2, parts)
    assert points.dtype == torch.float32
    assert torch.equal(points, torch.cat([POINTS, torch.tensor([0.0, 0, 1]).expand(5, 3)], 1))
    assert labels is parts
    assert set(PARTS.metrics()) == {"instance_miou", "class_miou"}


def test_class_loss_and_part_loss_are_one_number_a_cloud() -> None:
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    torch.testing.assert_close(CLASSES.loss(scores, labels), F.cross_entropy(scores, labels, reduction="none"))
    scores, labels = torch.randn(4, 5, 6), torch.randint(6, (4, 5))
    expected = torch.stack([F.cross_entropy(s, t) for s, t in zip(scores, labels, strict=True)])
    torch.testing.assert_close(PARTS.loss(scores, labels), expected)


@pytest.mark.parametrize("label", [-2, 3, 255])
def test_classes_out_of_range_are_refused(label: int) -> None:
    for labels in (CLASSES, PARTS):
        with pytest.raises(UserError, match=rf"^a\.txt has the label {label}; allowed: 0 to 2"):
            labels.check(cloud(label, [0] * 5), needs_label=False)


def test_only_what_calibrates_for_classes_may_lack_a_label() -> None:
    CLASSES.check(cloud(-1), needs_label=False)
    for labels, needed in ((CLASSES, True), (PARTS, True), (PARTS, False)):
        with pytest.raises(UserError, match="has the label -1; allowed: 0 to 2"):
            labels.check(cloud(-1, [0] * 5), needed)


@pytest.mark.parametrize(("label", "parts"), [(0, [0, 1, 1]), (1, [2, 2, 2]), (2, [3.0, 5.0, 4.0])])
def test_parts_of_their_category_pass(label: int, parts: list) -> None:
    PARTS.check(cloud(label, parts), needs_label=True)


@pytest.mark.parametrize(
    ("label", "parts", "message"),
    [
        (0, [0, 2, 3], "the part 2; allowed for bolt: 0 to 1"),
        (1, [1, 2, 2], "the part 1; allowed for nut: 2 to 2"),
        (2, [3, 4, 6], "the part 6; allowed for washer: 3 to 5"),
        (2, [3, 4, -1], "the part -1; allowed for washer"),
        (2, [3, 4.5, 4], "the part 4.5; allowed for washer"),
        (2, [3, np.nan, 4], "the part nan; allowed for washer"),
        (2, None, "no labels of its points; allowed: a part for each"),
    ],
)
def test_parts_of_other_categories_are_refused(label: int, parts: list | None, message: str) -> None:
    with pytest.raises(UserError, match=rf"^a\.txt has {message}"):
        PARTS.check(cloud(label, parts), needs_label=True)


def test_outputs() -> None:
    CLASSES.check_output(torch.zeros(2, 3), 5)
    PARTS.check_output(torch.zeros(2, 5, 6), 5)
    with pytest.raises(UserError, match=r"output is \(2, 5, 3\); allowed for classification: \(batch, classes\)"):
        CLASSES.check_output(torch.zeros(2, 5, 3), 5)
    with pytest.raises(UserError, match="gives 40 scores per sample; allowed: 3, one a class; model and data must"):
        CLASSES.check_output(torch.zeros(2, 40), 5)


@pytest.mark.parametrize(
    ("output", "form"),
    [(torch.zeros(2, 6), r"\(2, 6\)"), (torch.zeros(2, 4, 6), r"\(2, 4, 6\)"), ([torch.zeros(2, 5, 6)], "list")],
)
def test_outputs_that_are_no_scores_of_parts_are_refused(output: object, form: str) -> None:
    allowed = r"allowed for parts: \(batch, points, parts\), which is \(batch, 5, 6\)"
    with pytest.raises(UserError, match=f"output is {form}; {allowed}$"):
        PARTS.check_output(output, 5)


def test_scores_with_the_points_last_are_refused_with_a_remedy() -> None:
    # Every loss and metric takes the last axis for the parts.
    with pytest.raises(
        UserError, match=r"output is \(2, 6, 5\); allowed .*\(batch, 5, 6\); `transpose\(1, 2\)` at the end"
    ):
        PARTS.check_output(torch.zeros(2, 6, 5), 5)


def test_as_many_points_as_parts_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.init_args\.num_points is 6; allowed: any but 6, the number of parts"):
        PARTS.check_output(torch.zeros(2, 6, 6), 6)
