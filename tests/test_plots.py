import matplotlib.pyplot as plt

from cratelab import plots


def test_the_style_draws_crate_and_gpt2_first_on_a_white_ground():
    with plt.rc_context():
        plots.use_style()
        figure, axes = plt.subplots()
        first, second = axes.plot([[0, 0], [1, 2]])
        plt.close(figure)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert [first.get_color(), second.get_color()] == [plots.CRATE, plots.GPT2]
    assert len(set(plots.PALETTE)) == len(plots.PALETTE)
