import json

import numpy as np
import pytest
from scipy import stats
from test_training import corpus, recipe

import cratelab as cl
from cratelab.corpora.prepare import PreparedCorpus
from cratelab.experiments.comparison import compare, loss_table


def prepared() -> PreparedCorpus:
    return PreparedCorpus(corpus(), corpus(seed=1), tokenizer=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(presets=("toy", "toy")), r"presets must be one or more, each once; got \['toy', 'toy'\]"),
        (dict(presets=()), r"presets must be one or more, each once; got \[\]"),
        (dict(presets="Toy"), "no preset 'Toy'; there are toy, 1L"),
        (dict(presets=("toy", "huge")), "no preset 'huge'"),
        (dict(seeds=()), r"seeds must be one or more, each once; got \[\]"),
        (dict(seeds=range(0)), r"seeds must be one or more, each once; got \[\]"),
        (dict(seeds=0), r"seeds must be several numbers, such as range\(0\); got 0"),
        (dict(seeds=(1, 0, 1)), r"each once; got \[1, 0, 1\]"),
        (dict(seeds=(0, 2**32)), "seed must be"),
        (dict(seeds=(0, -1)), "seed must be"),
    ],
)
def test_a_comparison_of_nothing_or_of_the_same_twice_is_refused_before_any_work(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        compare(prepared(), recipe(), tmp_path / "new", context=12, on_run=pytest.fail, **wrong)
    assert not (tmp_path / "new").exists()


def test_runs_of_other_arguments_are_not_taken_for_these(tmp_path):
    compare(prepared(), recipe(), tmp_path, seeds=(0,), context=12)
    changed = PreparedCorpus(corpus(seed=2), corpus(seed=1), tokenizer=None)
    for arguments, message in [
        ((prepared(), recipe(steps=5), tmp_path), r"another recipe \(steps was 6, now 5\)"),
        ((changed, recipe(), tmp_path), "another training"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(*arguments, seeds=(0,), context=12)
    with pytest.raises(ValueError, match=r"another model \(context was 12, now 11\)"):
        compare(prepared(), recipe(), tmp_path, seeds=(0,), context=11)


def test_compares_both_models_under_each_seed_and_reads_what_is_done(tmp_path):
    names, steps = [], []
    first = compare(prepared(), recipe(), tmp_path, seeds=(0, 1), context=12, on_run=names.append, on_step=steps.append)
    assert names == ["crate-toy-0", "gpt2-toy-0", "crate-toy-1", "gpt2-toy-1"] and len(steps) == 24
    for run in first:
        model = cl.load(tmp_path / f"{run['model']}-toy-{run['seed']}" / "model")
        assert run["parameters"] == model.count_parameters(positions=False)
        assert run["curve"][-1] == (6 * 4 * 12, run["validation_loss"])
        about = json.loads((tmp_path / f"{run['model']}-toy-{run['seed']}" / "run.json").read_text())
        assert about["recipe"]["seed"] == run["seed"]  # of the windows; the models' weights differ by it too
    assert len({run["validation_loss"] for run in first}) == 4
    again = compare(
        prepared(), recipe(), tmp_path, seeds=(0, 1), context=12, on_step=lambda row: pytest.fail("trained")
    )
    assert again == first


def test_the_table_has_students_intervals():
    draw = np.random.default_rng(0).normal(3, 0.1, (2, 5))
    runs = [
        {"model": model, "preset": "1L", "seed": seed, "parameters": 7, "validation_loss": loss}
        for model, losses in zip(("crate", "gpt2"), draw.tolist(), strict=True)
        for seed, loss in enumerate(losses)
    ]
    for row, losses in zip(loss_table(runs), draw, strict=True):
        low, high = stats.t.interval(0.95, 4, loc=losses.mean(), scale=stats.sem(losses))
        assert row["mean"] == pytest.approx(losses.mean()) and row["seeds"] == 5
        assert row["half_width"] == pytest.approx((high - low) / 2)
