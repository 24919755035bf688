"""`cratelab layerwise`: rates and sparsity of a model, layer by layer."""

from pathlib import Path

import torch

from cratelab.cli.checks import check_results, model_folder
from cratelab.cli.options import Layerwise
from cratelab.cli.runs import load_run
from cratelab.cli.shared import as_facts, defined, results_file
from cratelab.layerwise import layer_statistics, token_lengths
from cratelab.provenance import provenance
from cratelab.storage import write_json
from cratelab.terminal import is_main_process, say

RATES = {"R": ("R before", "R after"), "R^c": ("R^c orthonormal before", "R^c orthonormal after")}
CONTROLS = {
    "identity": ("R^c orthonormal before", "R^c orthonormal identity"),
    "uniform": ("R^c orthonormal before", "R^c orthonormal uniform"),
    "random": ("R^c random before", "R^c random after"),
}


def check(options: Layerwise) -> None:
    model_folder(options.model)
    if not 1e-6 <= options.eps <= 1:
        raise ValueError(f"--eps must be at least 1e-6 and at most 1, a share of a token's length; got {options.eps}")
    check_results(_out(options), "eps")


def run(options: Layerwise) -> None:
    if not is_main_process():
        return  # a few thousand tokens are work for one
    model, corpus = load_run(options)
    text = corpus.validation
    length = min(model.config.context, len(text), options.n_tokens)
    if not length:
        raise ValueError("the corpus has no validation text: give a longer --corpus")
    n_windows = max(1, min(options.n_tokens, len(text)) // length)
    batches = torch.from_numpy(text.validation_windows(length, n_windows)).split(8)
    say(f"{n_windows} windows of {length} tokens; ε is {options.eps:g} of a token's mean length in each layer")
    eps = options.eps * token_lengths(model, batches)
    found = layer_statistics(model, batches, eps.clamp(min=1e-100), seed=options.seed)
    head = "".join(f"{name:>16}" for name in RATES) + "".join(f"{name:>10}" for name in CONTROLS)
    say(f"layer       ε{head}    active")
    for i in range(len(eps)):
        rates, controls = (
            [(float(found[before][i]), float(found[after][i])) for before, after in columns.values()]
            for columns in (RATES, CONTROLS)
        )
        say(
            f"{i + 1:5}{eps[i]:8.3g}"
            + "".join(f"{f'{before:.3g} → {after:.3g}':>16}" for before, after in rates)
            + "".join(f"{defined(after / before if before else None, 2):>10}" for before, after in controls)
            + f"{found['active'][i]:10.0%}"
        )
    say(
        "rates in nats a token, before → after attention; identity, uniform, random: after/before of R^c if each token "
        "sees only itself, or the mean of all before it, or against random subspaces; active: share of neurons"
    )
    facts = provenance(corpus=text.facts(), options=as_facts(options))
    columns = {name: values.tolist() for name, values in found.items()}
    _out(options).parent.mkdir(parents=True, exist_ok=True)
    write_json(_out(options), {"provenance": facts, "eps": eps.tolist(), "layers": columns})
    say(f"{_out(options)} has all of it")


def _out(options: Layerwise) -> Path:
    return results_file(options, "layerwise.json")
