"""`cratelab steer`: one neuron of a trained model, edited."""

from functools import partial

import torch

from cratelab.cli.options import Steer
from cratelab.cli.runs import load_run
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import encode
from cratelab.devices import best_device
from cratelab.language_model import LanguageModel
from cratelab.steering import Edit, direct_effect, full_effect, neuron_maxima, neuron_that_raises_most, steer
from cratelab.terminal import is_main_process, say


def check(options: Steer) -> None:
    if options.prompt is not None and not options.prompt:
        raise ValueError("--prompt has no token: leave it out to begin as the validation text does")


def _check_model(options: Steer, model: LanguageModel) -> None:
    last = len(model.blocks) - 1
    if options.layer is not None and not 0 <= options.layer <= last:
        raise ValueError(f"--layer must be 0 to {last}; got {options.layer}")
    if options.neuron is not None:
        direct_effect(model, last if options.layer is None else options.layer, torch.tensor([options.neuron]))


def run(options: Steer) -> None:
    if not is_main_process():
        return  # one neuron's effects on a few thousand tokens are work for one
    model, corpus = load_run(options, partial(_check_model, options))
    text, tokenizer = corpus.validation, corpus.tokenizer
    if not len(text):
        raise ValueError("the corpus has no validation text to steer on: give a longer --corpus")
    prompt = text[:12].tolist() if options.prompt is None else encode(tokenizer, options.prompt).tolist()
    if not prompt:
        raise ValueError("--prompt has no token: leave it out to begin as the validation text does")
    layer = len(model.blocks) - 1 if options.layer is None else options.layer
    maxima = neuron_maxima(model, text, options.n_tokens)[layer]
    neuron, shown = options.neuron, min(10, text.n_vocab)
    if neuron is None:
        neuron = neuron_that_raises_most(model, layer, maxima, shown, text.n_vocab)
    maximum, value = float(maxima[neuron]), options.value
    if value is None:
        if not maximum > 0:
            raise ValueError(
                f"neuron {neuron} of layer {layer} is not active in {options.n_tokens} tokens: give --value"
            )
        value = 2.0 if options.by == "scale" else 2 * maximum
    edit = Edit(layer, neuron, value, options.by)
    columns = _effects(model, text, edit, shown, options.n_tokens)
    done = {"set": "set to", "add": "plus", "scale": "times"}[options.by]
    say(f"layer {layer}, neuron {neuron}, at most {maximum:.2f} in {options.n_tokens} tokens, {done} {value:.2f}\n")
    heads = "raised by its atom", "raised in full", "lowered by its atom", "lowered in full"
    say("".join(f"{head:28}" for head in heads))
    for rank in range(shown):
        cells = [f"{tokenizer.decode([int(c.indices[rank])])!r} {c.values[rank]:+.2f}" for c in columns]
        say("".join(f"{cell:28}" for cell in cells).rstrip())
    say("by its atom: logits for a unit of it, before the last norm's division; in full: mean change of log p\n")
    prompts = torch.tensor([prompt], device=best_device())
    sampling = dict(temperature=options.temperature, seed=options.seed, n_vocab=text.n_vocab)
    for name, edits in ("without", []), ("with", [edit]):
        with steer(model, *edits):
            tokens = model.generate(prompts, options.n_new, **sampling)
        say(f"{name}: {tokenizer.decode(tokens[0].tolist())}")


def _effects(
    model: LanguageModel, text: TokenizedCorpus, edit: Edit, n: int, n_tokens: int
) -> list[torch.return_types.topk]:
    """The n tokens raised most by the atom and in full, then those lowered most."""
    direct = direct_effect(model, edit.layer, edit.neuron)[0, : text.n_vocab]
    length = min(model.config.context, len(text))
    windows = torch.from_numpy(text.validation_windows(length, max(1, min(n_tokens, len(text)) // length)))
    full = full_effect(model, windows, edit.layer, edit.neuron, edit.value[None], edit.by)[0, : text.n_vocab]
    if not full.isfinite().all():
        raise ValueError(f"the model gives no finite numbers with --value {float(edit.value):g}: take a smaller one")
    return [effect.topk(n, largest=largest) for largest in (True, False) for effect in (direct, full)]
