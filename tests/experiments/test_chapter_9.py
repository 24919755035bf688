import json
from itertools import product

import numpy as np
import pytest
import torch

import cratelab as cl
from cratelab import provenance
from cratelab.cli import main
from cratelab.corpora import tinyworld
from cratelab.experiments import chapter_9, rates, tinyworld_runs
from cratelab.experiments.chapter_9 import (
    compare_on_tinyworld,
    ladder,
    measure,
    other_rates,
    runner_up,
    spans,
    sparser,
    to_confirm,
)
from cratelab.experiments.tinyworld_runs import Setting
from cratelab.interpret.records import collect_records


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tinyworld_runs, "N_TOKENS", 40_000)
    monkeypatch.setattr(chapter_9, "fresh_text", lambda seed: tinyworld.generate(3000, seed=9 + seed, context=65))
    for name, value in dict(DEPTHS=(1,), LAMBDAS=(1.0,), TOP_KS=(4,), SPANS=(0,)).items():
        monkeypatch.setattr(chapter_9, name, value)


@pytest.fixture
def brief(monkeypatch):
    """Measures little: what is measured has a test of its own."""

    def measure(model, world, seed=0):
        records = collect_records(model, world.corpus(), n_tokens=500, n_random=0)
        return {"density": records.density.mean(1).tolist()}

    monkeypatch.setattr(chapter_9, "measure", measure)


def test_a_run_on_tinyworld_is_trained_and_measured_once(small, brief, tmp_path):
    steps, settings = [], [*ladder(4), *spans(4), *sparser(4)]
    runs = compare_on_tinyworld(tmp_path, settings, (0, 1), on_step=steps.append)
    assert len(runs) == 2 * len(settings) == 2 * (2 + 2 + 1 + 1) and len(steps) == 4 * len(runs)
    limited = next(run for run in runs if run["top_k"] == 4)
    assert max(limited["trained"]["density"]) <= 4 / 256 and "untrained" not in limited
    larger = next(run for run in runs if run["lam"] == 1.0)
    assert "untrained" in runs[0] and "untrained" in larger
    kept = cl.load(tmp_path / f"crate-2L-4-{rates.TUNED['crate', 2]:g}-lam1-1" / "model")
    assert kept.config.lam == 1.0 and kept.config.n_layers == 2
    (findings,) = tmp_path.glob("gpt2-1L-4-*-0/findings.json")
    findings.unlink()
    assert compare_on_tinyworld(tmp_path, settings, (0, 1)) == runs


def test_findings_are_of_the_code_that_trained_and_of_that_which_measured(small, brief, tmp_path, monkeypatch):
    """What is read again is still of the code that made it."""
    setting = Setting("gpt2", 1, 4, 3e-3)
    monkeypatch.setattr(provenance, "library_code", lambda: {"mssa": "trained", "intervals": "both"})
    setting.train(tinyworld_runs.new_world(), 0, tmp_path)
    for library in {"mssa": "measured", "intervals": "both"}, {"mssa": "later"}:
        monkeypatch.setattr(chapter_9, "library_code", lambda library=library: library)
        (found,) = compare_on_tinyworld(tmp_path, [setting], (0,))
        assert found["library"] == {"mssa": "several", "intervals": "both"}


def test_findings_on_other_text_are_made_anew(small, brief, tmp_path, monkeypatch):
    first = compare_on_tinyworld(tmp_path, ladder(4), (0,))
    monkeypatch.setattr(chapter_9, "fresh_text", lambda seed: tinyworld.generate(3000, seed=5, context=65))
    assert compare_on_tinyworld(tmp_path, ladder(4), (0,)) != first
    monkeypatch.setattr(tinyworld_runs, "N_TOKENS", 41_000)
    with pytest.raises(ValueError, match=r"crate-1L-4-[\d.]+-0 holds a run with another training"):
        compare_on_tinyworld(tmp_path, ladder(4), (0,))


@pytest.mark.parametrize(("seeds", "message"), [((), "seeds must be"), ((0, 0), "each once")])
def test_nothing_to_compare_is_refused_before_any_work(tmp_path, monkeypatch, seeds, message):
    monkeypatch.setattr(tinyworld, "generate", lambda *a, **options: pytest.fail("a world was made"))
    with pytest.raises(ValueError, match=message):
        compare_on_tinyworld(tmp_path, ladder(4), seeds)


def test_gaps_lie_above_the_floor_and_fall_with_training(small, brief, tmp_path):
    gaps = [compare_on_tinyworld(tmp_path, [Setting("gpt2", 1, steps, 1e-2)], (0,))[0]["gap"] for steps in (30, 60)]
    assert gaps[0] > gaps[1] > 0


def test_what_is_measured_is_there():
    """Density, dead neurons and named neurons, counted again on the activations themselves."""
    world = tinyworld.generate(3000, context=65)
    text = world.corpus()
    torch.manual_seed(0)
    model = cl.Gpt2(cl.Gpt2Config.preset("toy", n_layers=1, vocab_size=512, context=64, top_k=6)).eval()
    found = measure(model, world)
    seen = []
    model.blocks[0].neurons.register_forward_hook(lambda module, inputs, a: seen.append(a[0]))
    for document in range(text.n_documents):
        start, stop = text.document_span(document)
        for first in range(start, stop, 64):
            model(torch.from_numpy(text[first : min(first + 64, stop)].astype(np.int64))[None])
    a = torch.cat(seen)
    assert found["density"] == pytest.approx([float((a > 0).double().mean())])
    assert found["dead"] == pytest.approx([float((a.amax(0) <= 0).double().mean())])
    protocols = "top-and-random", "random-only", "anthropic"
    explainers = "token", "suffix", "concept"
    assert [(row["protocol"], row["explainer"]) for row in found["rows"]] == list(product(protocols, explainers))
    by_token = found["rows"][0]
    assert by_token["within_token"] == 0 < by_token["mean"], "a table of tokens says the same of every occurrence"
    assert 0 < found["token_share"][0] < 1 and found["grammar"]["word"] == [0] and found["all"]["word"][0] > 0
    assert found["uses"] == {} or all(0 <= area <= 1 for area in found["uses"].values())


CHAPTER = [(ladder(4), [0, 1, 2]), (runner_up(4), [0, 1]), (spans(4), [0, 1]), (sparser(4), [0])]
SPARSER = [(to_confirm(4), [3, 4, 5]), (other_rates(4), [0, 1, 2])]


@pytest.mark.parametrize(
    "what, table, plan", [("chapter-9", "crate_against_gpt2", CHAPTER), ("sparser", "sparser_networks", SPARSER)]
)
def test_one_command_makes_a_table_of_the_chapter(what, table, plan, tmp_path, monkeypatch, capsys):
    asked = []

    def compared(folder, settings, seeds, on_run, on_step):
        asked.append((list(settings), list(seeds)))
        sparse = {"lam": 1.0 if len(asked) == 1 else 0.1, "top_k": None}
        return [{"made": len(asked), "library": {"mssa": "0" * len(asked)}} | sparse]

    monkeypatch.setattr(chapter_9, "compare_on_tinyworld", compared)
    monkeypatch.setattr(chapter_9, "_afterwards", lambda folder, run, on_run: {"of": run["made"], "library": {}})
    main(["reproduce", what, "--out", str(tmp_path), "--seeds", "3", "--steps", "4"])
    held = json.loads((tmp_path / f"{table}.json").read_text())
    assert held["provenance"]["seeds"] == plan[0][1]
    assert [run["made"] for run in held["findings"]] == list(range(1, len(plan) + 1))
    assert held.get("afterwards") == ([{"of": 1}] if what == "sparser" else None)
    assert held["provenance"]["library"] == {"mssa": "several"} and asked == plan
    assert f"{table}.json is what cratelab/reference holds" in capsys.readouterr().out


def test_sparser_networks_are_tested_on_other_seeds_and_tried_at_the_rates_on_both_sides():
    rates_of = {(each.model, each.lam, each.top_k): each.peak_rate for each in to_confirm(4)}
    assert rates_of == {
        ("crate", 0.1, None): 1e-2, ("gpt2", 0.1, None): 3e-3, ("crate", 1.0, None): 1e-2, ("gpt2", 0.1, 16): 3e-3
    }  # fmt: skip
    tried = {(each.model, each.lam, each.top_k): [] for each in other_rates(4)}
    for each in other_rates(4):
        tried[each.model, each.lam, each.top_k].append(each.peak_rate)
    assert tried == {("crate", 1.0, None): [6e-3, 2e-2], ("gpt2", 0.1, 16): [1e-3, 6e-3]}


def test_the_control_has_the_weights_of_the_network_as_it_is_and_is_as_sparse(small, brief, tmp_path):
    for setting, knob in (Setting("crate", 1, 30, 1e-2), "lam"), (Setting("gpt2", 1, 30, 3e-3), "top_k"):
        (as_it_is,) = compare_on_tinyworld(tmp_path, [setting], (4,))
        density = as_it_is["trained"]["density"][0] / 2
        sparse = as_it_is | {"trained": {"density": [density]}}
        found = chapter_9._afterwards(tmp_path, sparse, None)
        assert found["seed"] == 4 and found["trained"]["density"][0] == pytest.approx(density, abs=0.01)
        assert found[knob] == round(256 * density) if knob == "top_k" else 0.1 < found[knob] < 10
        assert found["gap"] != as_it_is["gap"]
        model = cl.load(tmp_path / f"{setting.name}-4" / "model")
        turned = chapter_9.turned_afterwards(model, tinyworld.generate(3000, seed=13, context=65).corpus(), density)
        for name, tensor in model.state_dict().items():
            assert turned.state_dict()[name].equal(tensor), name
        assert chapter_9._afterwards(tmp_path, sparse, None) == found  # read, not made again
