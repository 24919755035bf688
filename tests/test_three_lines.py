"""The running example is what its docstring says, judged by numpy."""

import math

import numpy as np
import pytest

from cratelab.three_lines import three_lines


@pytest.mark.parametrize("degrees", [35, 60, 90])
def test_without_noise_thirty_points_lie_on_each_of_three_lines_at_this_angle(degrees):
    z, line, U = three_lines(noise=0, degrees=degrees)
    assert z.shape == (90, 3) and line.bincount().tolist() == [30, 30, 30] and U.shape == (3, 3, 1)
    axes = []
    for k in range(3):
        points = z[line == k].numpy()
        assert np.linalg.matrix_rank(points, tol=1e-9) == 1 and (points @ points[0] < 0).sum() == 15
        lengths = np.linalg.norm(points, axis=1)
        assert math.isclose(lengths.min(), 0.5) and math.isclose(lengths.max(), 1.4)
        axes.append(np.linalg.svd(points)[2][0])
        np.testing.assert_allclose(np.abs(axes[-1] @ U[k, :, 0].numpy()), 1)
    between = np.degrees(np.arccos(np.abs(np.array(axes) @ np.array(axes).T)[[0, 0, 1], [1, 2, 2]]))
    np.testing.assert_allclose(between, degrees)
    assert np.abs(U.numpy()).min() > 0.02, "a line lies in a coordinate plane"


def test_the_noise_keeps_its_form_and_grows_with_its_argument():
    clean, some, more = (three_lines(noise=noise)[0] for noise in (0, 0.1, 0.3))
    np.testing.assert_allclose(3 * (some - clean).numpy(), (more - clean).numpy(), atol=1e-12)
    assert 0.09 < float((some - clean).std()) < 0.11
    assert 0.95 < float(clean.square().sum(-1).mean()) < 1.05


@pytest.mark.parametrize(
    ("noise", "degrees"), [(-1, 35), (math.nan, 35), (math.inf, 35), (0, 0), (0, 91), (0, math.nan)]
)
def test_arguments_out_of_range_are_refused(noise, degrees):
    with pytest.raises(ValueError, match=r"noise|degrees"):
        three_lines(noise, degrees)
