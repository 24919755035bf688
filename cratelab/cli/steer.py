"""`cratelab steer`: one neuron of a trained model, edited."""

from functools import partial

import torch

from cratelab.cli.options import Steer
from cratelab.cli.runs import load_run
from cratelab.corpora.tokenizers import encode
from cratelab.devices import best_device
from cratelab.language_model import LanguageModel
from cratelab.steering import direct_effect, full_effect, neuron_maxima, steer
from cratelab.terminal import say


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
    model, corpus = load_run(options, partial(_check_model, options))
    text, tokenizer, device = corpus.validation, corpus.tokenizer, best_device()
    if not len(text):
        raise ValueError("the corpus has no validation text to steer on: give a longer --corpus")
    prompt = text[:12].tolist() if options.prompt is None else encode(tokenizer, options.prompt).tolist()
    if not prompt:
        raise ValueError("--prompt has no token: leave it out to begin as the validation text does")
    layer = len(model.blocks) - 1 if options.layer is None else options.layer
    maxima = neuron_maxima(model, text, options.n_tokens)[layer]
    neuron, shown = options.neuron, min(10, text.n_vocab)
    if neuron is None:
        raised = direct_effect(model, layer, torch.arange(len(maxima)))[:, : text.n_vocab].topk(shown).values
        neuron = int((raised.mean(1) * maxima).argmax())
    direct = direct_effect(model, layer, torch.tensor([neuron]))[0, : text.n_vocab]
    maximum, value = float(maxima[neuron]), options.value
    if value is None:
        if not maximum > 0:
            raise ValueError(
                f"neuron {neuron} of layer {layer} is not active in {options.n_tokens} tokens: give --value"
            )
        value = 2.0 if options.by == "scale" else 2 * maximum
    edit = dict(layer=layer, neuron=neuron, by=options.by, value=value)
    length = min(model.config.context, len(text))
    windows = torch.from_numpy(text.validation_windows(length, max(1, min(options.n_tokens, len(text)) // length)))
    full = full_effect(model, windows.to(device), layer, torch.tensor([neuron]), torch.tensor([value]), options.by)[
        0, : text.n_vocab
    ]
    if not full.isfinite().all():
        raise ValueError(f"the model gives no finite numbers with --value {value:g}: take a smaller one")
    done = {"set": "set to", "add": "plus", "scale": "times"}[options.by]
    say(f"layer {layer}, neuron {neuron}, at most {maximum:.2f} in {options.n_tokens} tokens, {done} {value:.2f}\n")
    say(
        "".join(
            f"{head:28}" for head in ("raised by its atom", "raised in full", "lowered by its atom", "lowered in full")
        )
    )
    columns = [effect.topk(shown, largest=largest) for largest in (True, False) for effect in (direct, full)]
    for rank in range(shown):
        cells = [f"{tokenizer.decode([int(c.indices[rank])])!r} {c.values[rank]:+.2f}" for c in columns]
        say("".join(f"{cell:28}" for cell in cells).rstrip())
    say("by its atom: logits for a unit of it, before the last norm's division; in full: mean change of log p\n")
    for name, edits in ("without", {}), ("with", edit):
        with steer(model, **edits):
            tokens = model.generate(
                torch.tensor([prompt], device=device),
                options.n_new,
                temperature=options.temperature,
                seed=options.seed,
                n_vocab=text.n_vocab,
            )
        say(f"{name}: {tokenizer.decode(tokens[0].tolist())}")
