"""What exercises 10.E and 11.E say of packaged models holds of them, by margins far above rounding."""

import numpy as np
import pytest
import torch

from cratelab.checks import broken_runs, steering
from cratelab.checks.grading import CheckFailed
from cratelab.checks.push_curves import push_curves


@pytest.fixture(scope="module")
def runs() -> dict[str, broken_runs.Run]:
    by_letter = broken_runs.broken_runs()
    return {fault: by_letter[letter] for letter, fault in broken_runs.FAULT_OF.items()}


def test_each_run_has_the_fault_that_its_curves_are_said_to_show(runs):
    sound = runs["none"]
    assert runs["price"].losses[0] > 10 * sound.losses[0] and max(runs["price"].curves["L0"]) < 0.5
    assert runs["rate"].losses[0] == pytest.approx(sound.losses[0]) and runs["rate"].curves["dead"][0] > 0.9
    assert runs["rate"].curves["explained"][-1] < 0.4
    assert runs["hook"].curves["nats lost"] == [0] * 8 and 0.7 < runs["hook"].curves["explained"][-1] < 0.9
    jumps = {fault: max(np.diff(run.losses[20:])) for fault, run in runs.items()}
    assert jumps["order"] > 0.2 > 0.1 > jumps["none"]
    for name in "L0", "explained", "nats lost":  # the same text, weights and seed: they look alike
        assert runs["lengths"].curves[name] == pytest.approx(sound.curves[name], abs=0.2, rel=0.4)
    assert runs["lengths"].sae.W_dec.norm(dim=1).median() > 1.3
    torch.testing.assert_close(sound.sae.W_dec.norm(dim=1), torch.ones(512))


def test_the_run_that_learned_by_heart_looks_best_and_is_worse_on_a_fresh_text(runs):
    def explained(run, x):
        return 1 - float((run.sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())

    last = {fault: run.curves["explained"][-1] for fault, run in runs.items()}
    assert max(last, key=last.get) == "few" and last["few"] > last["none"] + 0.05
    assert explained(runs["none"], runs["none"].fresh) > explained(runs["few"], runs["few"].fresh) + 0.1
    assert explained(runs["few"], runs["few"].seen) == pytest.approx(last["few"], abs=1e-4)


def test_runs_leave_the_seed_alone():
    state = torch.get_rng_state()
    broken_runs.train.__wrapped__("few", 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(5))
def test_measured_curves_have_the_features_that_are_asked_of_drawn_ones(seed):
    curves, highest = push_curves(seed)
    for feature in steering._FEATURES:
        for what, value, least, most in steering._seen(feature, curves, highest):
            assert least <= value <= most, what


def test_saturation_may_begin_later_than_measured(capsys):
    def curve(top, half):
        return [top * s / (half + abs(s)) for s in steering.STRENGTHS]

    lift = {"lift, CRATE": curve(9, 1), "lift, GPT-2": curve(9, 8)}
    steering.drawn(lambda strengths: push_curves()[0] | lift)
    assert "strong" in capsys.readouterr().out
    with pytest.raises(CheckFailed, match=r"(?s)6 of 7 right.*strong"):
        steering.drawn(lambda strengths: push_curves()[0] | lift | {"lift, GPT-2": curve(20, 80)}, reasons=True)


def test_measured_curves_pass_as_drawn_ones(capsys):
    steering.drawn(lambda strengths: push_curves()[0])
    assert capsys.readouterr().out.count(": ") >= len(steering._FEATURES)
