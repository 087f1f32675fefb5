import torch

from pack_ptq.models.points.farthest_point_sampling import farthest_point_sampling
from pack_ptq.models.points.set_abstraction import GlobalAbstraction, Scale, SetAbstraction


def test_maximum_over_the_points_in_each_ball():
    scales = [Scale(0.8, 20, (6, 7)), Scale(1.5, 20, (5,))]
    stage, x = SetAbstraction(2, 4, scales).eval(), torch.randn(2, 20, 5)
    found = stage(x)
    assert found.shape == (2, 4, 3 + 7 + 5)
    for b, i in ((0, 0), (1, 3)):
        centre = x[b, farthest_point_sampling(x[..., :3], 4)[b, i], :3]
        expected = [centre]
        for scale, mlp in zip(scales, stage.mlps, strict=True):
            inside = x[b, (x[b, :, :3] - centre).norm(dim=1) < scale.radius]
            relative = torch.cat([inside[:, :3] - centre, inside[:, 3:]], 1)
            expected.append(mlp(relative.T[None, :, None]).amax((0, 2, 3)))
        torch.testing.assert_close(found[b, i], torch.cat(expected))


def test_channels_after_its_own_are_passed_over():
    stage, x = SetAbstraction(1, 4, [Scale(0.8, 20, (6,))]).eval(), torch.randn(2, 20, 6)
    assert torch.equal(stage(x), stage(x[..., :4]))


def test_whole_object():
    stage, x = GlobalAbstraction(2, (6, 7)).eval(), torch.randn(2, 20, 5)
    assert torch.equal(stage(x), stage.mlp(x.transpose(1, 2)).amax(2))
