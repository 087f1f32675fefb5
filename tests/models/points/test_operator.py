import torch
from torch.overrides import TorchFunctionMode

from pack_ptq.models.points.ball_query import ball_query
from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling
from pack_ptq.models.points.gathering import gather_points, group_points
from pack_ptq.models.points.interpolation import average_by_distance, interpolate
from pack_ptq.models.points.knn import knn


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_each_operator_as_one_call_by_name():
    x = torch.randn(2, 9, 3)
    with Names() as mode:
        index = farthest_point_sampling(x, samples=4)
        centres = gather_points(x, index)
        neighbours = ball_query(centres, x, radius=1.0, neighbours=3)
        group_points(x, centres, neighbours)
        knn(centres, x, 2)
        interpolate(x, centres, centres)
    operators = (farthest_point_sampling, gather_points, ball_query, group_points, knn, knn, average_by_distance)
    assert mode.names == [operator.__name__ for operator in operators]


def test_no_mode_changes_nothing():
    x = torch.randn(2, 9, 3)
    with Names():
        seen = farthest_point_sampling(x, 4)
    assert torch.equal(farthest_point_sampling(x, 4), seen)
