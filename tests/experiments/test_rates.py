import json
from statistics import mean

import pytest
from test_training import corpus

from cratelab.corpora.prepare import PreparedCorpus
from cratelab.corpora.tokenizers import byte_encoding
from cratelab.experiments import rates, tinyworld_runs
from cratelab.experiments.rates import best_rates, reproduce_rates
from cratelab.experiments.tinyworld_runs import Setting, fresh_text, new_world
from cratelab.provenance import changed_since, read_reference


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tinyworld_runs, "N_TOKENS", 40_000)
    for name, value in dict(PEAKS=(1e-3, 1e-2), DEPTHS=(1,), TOY_CONTEXT=16).items():
        monkeypatch.setattr(rates, name, value)
    whole = PreparedCorpus(corpus(n=4000), corpus(n=1500, seed=1), byte_encoding())
    monkeypatch.setattr(rates, "prepare", lambda name, **options: whole)


def test_every_model_is_trained_at_every_rate_and_what_is_done_is_read(small, tmp_path):
    steps = []
    table = reproduce_rates(tmp_path, 2, (2, 3), on_step=steps.append)
    held = json.loads(table.read_text())
    assert held["provenance"]["seeds"] == [0, 1] and len(held["findings"]) == 2 * 2 * 2 * 2
    assert len(steps) == 2 * 2 * 2 * (2 + 3)
    assert {(run["ladder"], run["steps"]) for run in held["findings"]} == {("toy", 2), ("width 64", 3)}
    again = reproduce_rates(tmp_path, 2, (2, 3), on_step=lambda row: pytest.fail("trained again"))
    assert json.loads(again.read_text())["findings"] == held["findings"]
    for other in "toys-0.01/crate-toy-1", "gpt2-1L-3-0.001-0":  # trained by other code
        run = json.loads((tmp_path / other / "run.json").read_text())
        run["provenance"]["library"]["mssa"] = "0" * 12
        (tmp_path / other / "run.json").write_text(json.dumps(run))
        facts = json.loads(reproduce_rates(tmp_path, 2, (2, 3)).read_text())["provenance"]
        assert changed_since(facts) == ["mssa"]
        run["provenance"]["library"] = facts["library"] | {"mssa": held["provenance"]["library"]["mssa"]}
        (tmp_path / other / "run.json").write_text(json.dumps(run))


def test_the_rate_of_the_table_is_the_rate_of_the_run(small, tmp_path):
    """At a tenth of the rate less is learned in a few steps."""
    largest = []
    table = reproduce_rates(tmp_path, 1, (20, 20), on_step=lambda row: largest.append(row["learning_rate"]))
    losses = {(r["ladder"], r["model"], r["peak_rate"]): r["loss"] for r in json.loads(table.read_text())["findings"]}
    for ladder in "toy", "width 64":
        for model in "crate", "gpt2":
            assert losses[ladder, model, 1e-2] < losses[ladder, model, 1e-3]
    assert max(largest) == pytest.approx(1e-2)


def test_the_best_rate_is_that_of_the_lowest_mean_loss():
    def run(model, rate, seed, loss):
        return dict(ladder="toy", model=model, n_layers=2, steps=9, peak_rate=rate, seed=seed, loss=loss)

    runs = [run("crate", 1, 0, 0.1), run("crate", 1, 1, 0.9), run("crate", 2, 0, 0.4), run("crate", 2, 1, 0.4)]
    runs += [run("gpt2", 1, 0, 0.3), run("gpt2", 2, 0, 0.4)]
    assert best_rates(runs) == {("toy", "crate", 2, 9): 2, ("toy", "gpt2", 2, 9): 1}


def test_all_that_is_compared_has_the_rate_that_its_sweep_found_best():
    runs = read_reference("rates")["findings"]
    best = best_rates(runs)
    assert not {rates.PEAKS[0], rates.PEAKS[-1]} & set(best.values()), "the best lies at the edge of the sweep"
    for model, rate in rates.TOY_RATE.items():
        assert best["toy", model, 2, 1500] == rate
    for (model, n_layers), rate in rates.TUNED.items():
        assert best["width 64", model, n_layers, 2000] == rate
    for ladder, model, n_layers, _ in best:
        tried = {rate: set() for rate in rates.PEAKS}
        for run in runs:
            if (run["ladder"], run["model"], run["n_layers"]) == (ladder, model, n_layers):
                tried[run["peak_rate"]].add(run["seed"])
        assert all(tried.values()) and all(tried[rate] == {0, 1, 2} for rate in rates.PEAKS[1:-1])
    assert all(0 < run["loss"] < 7 for run in runs) and mean(run["loss"] for run in runs) < 2


def test_fresh_text_shares_no_document_with_the_training_text(monkeypatch):
    generate = tinyworld_runs.tinyworld.generate
    monkeypatch.setattr(tinyworld_runs.tinyworld, "generate", lambda n, **options: generate(30_000, **options))

    def documents(world):
        text = world.corpus()
        return {tuple(text[slice(*text.document_span(i))]) for i in range(text.n_documents)}

    trained_on, first, second = documents(new_world().part("train")), documents(fresh_text(0)), documents(fresh_text(1))
    assert first and not trained_on & (first | second) and first != second


def test_a_setting_is_the_model_that_it_names():
    setting = Setting("gpt2", 1, 10, 3e-3, top_k=4, span=0)
    assert setting.name == "gpt2-1L-10-0.003-top4-span0"
    config = setting.new(300, 0).config
    assert (config.top_k, config.span, config.n_layers, config.vocab_size) == (4, 0, 1, 320)
    recipe = Setting("crate", 2, 10, 1e-2, lam=0.3).recipe(5)
    assert (recipe.peak_rate, recipe.final_rate, recipe.seed, recipe.batch) == (1e-2, 1e-3, 5, 8)
