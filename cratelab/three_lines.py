"""The book's running example: ninety points near three lines."""

import math

import torch
from torch import Tensor


def three_lines(noise: float = 0.12, degrees: float = 35.0) -> tuple[Tensor, Tensor, Tensor]:
    """Ninety points near three lines through the origin of three-dimensional space, thirty to a line.

    On its line a point lies 0.5 to 1.4 from the origin, on either side of it; in the mean square that is about 1. What
    stands beside the line is Gaussian, and the same for every `noise` but for its size, so that the points themselves
    are `three_lines(noise=0)`.

    Args:
        noise: standard deviation of each of the three coordinates of what is added.
        degrees: between each two lines, above 0 and at most 90.

    Returns:
        Points (90, 3) in float64, the line of each (90,), sorted, and the lines as bases (3, 3, 1) of subspaces
        (k, d, p).

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite standard deviation, 0 or more; got {noise}")
    if not 0 < degrees <= 90:
        raise ValueError(f"degrees must be above 0 and at most 90; got {degrees}")
    cosine = math.cos(math.radians(degrees))
    identity = torch.eye(3, dtype=torch.float64)
    corner = torch.linalg.cholesky((1 - cosine) * identity + cosine)  # rows of length 1 at these angles
    skew = torch.tensor([[0.0, 0.5, -0.8], [-0.5, 0.0, 0.3], [0.8, -0.3, 0.0]], dtype=torch.float64)
    directions = corner @ torch.linalg.matrix_exp(skew)  # away from the coordinate axes
    line = torch.arange(90) // 30
    places = torch.linspace(0.5, 1.4, 15, dtype=torch.float64)
    places = torch.cat([places, -places]).repeat(3)
    beside = torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return places[:, None] * directions[line] + noise * beside, line, directions[:, :, None]
