import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from cratelab import plots
from cratelab.three_lines import three_lines


def test_the_style_draws_crate_and_gpt2_first_on_a_white_ground():
    with plt.rc_context():
        plots.use_style()
        figure, axes = plt.subplots()
        first, second = axes.plot([[0, 0], [1, 2]])
        plt.close(figure)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert [first.get_color(), second.get_color()] == [plots.CRATE, plots.GPT2]
    assert len(set(plots.PALETTE)) == len(plots.PALETTE)


METRICS = [{"tokens": 8 * step, "loss": 1 / step, "validation_loss": 1 / step} for step in (1, 2, 3)]
RUNS = [{"model": "crate", "preset": "toy", "curve": [[8, 2.0], [16, 1.0]]}]


@pytest.mark.parametrize(("save", "rows"), [(plots.save_loss_curve, METRICS), (plots.save_comparison, RUNS)])
@pytest.mark.parametrize("name", ["loss.png", "loss.svg", "loss.pdf", "loss"])
def test_figures_are_written_whole_or_not_at_all(save, rows, name, tmp_path, monkeypatch):
    written = tmp_path / (name if "." in name else "loss.png")
    save(rows, tmp_path / name, floor=0.1)
    before = written.read_bytes()
    assert before.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[written.suffix[1:]])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save(rows, tmp_path / name)
    assert written.read_bytes() == before and list(tmp_path.iterdir()) == [written]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_losses_that_are_no_number_leave_a_gap(nothing, tmp_path):
    """As JSON has them: null."""
    spoilt = [*METRICS, {"tokens": 32, "loss": nothing, "validation_loss": nothing}]
    plots.save_loss_curve(spoilt, tmp_path / "loss.png", floor=nothing)
    runs = [RUNS[0] | {"curve": curve} for curve in ([[8, 2.0], [16, nothing]], [[8, nothing]], [])]
    plots.save_comparison(runs, tmp_path / "runs.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unknown_kind_of_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="doc"):
        plots.save_loss_curve(METRICS, tmp_path / "loss.doc")
    assert not list(tmp_path.iterdir())


def test_each_line_has_its_colour_and_the_points_lie_on_it():
    z, line, U = three_lines(noise=0)
    figure, axes = plt.subplots()
    plots.draw_three_lines(axes, z, line, U)
    points = [np.asarray(dots.get_offsets()) for dots in axes.collections]
    drawn = [np.stack(curve.get_data(), -1) for curve in axes.lines]
    plt.close(figure)
    assert [len(each) for each in points] == [30, 30, 30] and len(drawn) == 3
    for dots, ends in zip(points, drawn, strict=True):
        along = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
        assert np.abs(dots @ [-along[1], along[0]]).max() < 1e-9  # beside the line there is nothing
        assert np.abs(dots).max() < 1.6 and np.linalg.norm(dots, axis=1).max() > 0.5
