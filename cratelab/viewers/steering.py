"""Neurons to push with a slider: what comes next as each of them is set to growing multiples of its maximum.

Everything is computed beforehand. Where scripts do not run, a table for each neuron shows the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cratelab.colours import CRATE
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.language_model import LanguageModel
from cratelab.steering import STRENGTHS, Frontier, generate_when_set, steered_logits
from cratelab.viewers.frame import (
    Viewer,
    check_colour,
    escape,
    fragment,
    gap_of,
    number,
    places,
    script_data,
    shown_token,
    visible,
)

HEADS = "the neuron is", "most probable next tokens", "all targets", "continuation", "lift, nats", "off target, nats"

BODY = """\
<div class="title">{label}</div>
<div class="bar" hidden><label>neuron <select class="neuron">{neurons}</select></label>
<label>text <select class="prompt">{prompts}</select></label></div>
<div class="bar" hidden><label class="slide">strength <input type="range" min="0" max="{last}" value="0"></label>
<output></output></div>
<p><small>text so far</small> <span class="given">{prompt}</span><span class="goes"></span></p>
<div class="next" role="status" hidden></div>
<div class="facts" hidden></div>
<div class="tables">{tables}</div>"""


@torch.no_grad()
def steering_viewer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Tensor,
    layer: int,
    neurons: Tensor,
    maxima: Tensor,
    targets: Tensor,
    found: Frontier,
    names: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
    title: str = "Steering",
    colour: str = CRATE,
    n_tokens: int = 8,
    n_new: int = 12,
) -> Viewer:
    """Show, for neurons as they are and set to multiples of their maxima, the tokens that come next.

    Beside the most probable next tokens stand all targets together, the continuation by the most probable token each
    time, and what `frontier` measured.

    Args:
        model: CRATE or GPT-2; inside `splice` its neurons are the auto-encoder's features.
        tokenizer: of its tokens; those beyond it, with which the vocabulary is padded, are never among the most
            probable.
        prompts: (p, n) tokens.
        layer: of the neurons.
        neurons: (m,) integers.
        maxima: (m,) their maxima.
        targets: (m, v) bool, tokens to be marked.
        found: of the same neurons, in this order, at the same strengths.
        names: m, what stands beside each neuron's number.
        strengths: multiples of the maximum.
        title: what stands above.
        colour: "#rrggbb", of the targets' bars.
        n_tokens: how many next tokens.
        n_new: length of the continuation.

    Raises:
        ValueError: there is no neuron, prompt or strength, the arguments are of different numbers of neurons or
            strengths, a maximum, a strength or what the model gives is not finite, or `colour` is no colour.
    """
    _check(prompts, neurons, maxima, targets, found, names, strengths, colour, n_tokens, n_new)
    n_vocab = min(model.config.vocab_size, tokenizer.n_vocab)  # the tokens that have a text
    values = _values(model, maxima, strengths)
    if targets.dtype != torch.bool or targets.shape[1] < n_vocab:
        given = f"{targets.dtype} of {targets.shape[1]}"
        raise ValueError(f"targets must be torch.bool, and mark all {n_vocab} tokens; got {given}")
    prompts = prompts.to(values.device)
    chances = _chances(model, prompts, layer, neurons, values, n_vocab)
    texts = _continuations(model, prompts, layer, neurons, values, n_vocab, n_new)
    table: dict[int, int] = {}  # token -> its place among those shown
    steps = _steps(found, chances, texts, targets.cpu()[:, :n_vocab], n_tokens, table)
    data = {
        "prompts": [places(table, prompt.tolist()) for prompt in prompts],
        "strengths": ["as it is", *(f"set to {number(s)} × its maximum" for s in strengths)],
        "neurons": [
            {"name": visible(f"layer {layer}, neuron {int(neuron)}: {name}"), "steps": of}
            for neuron, name, of in zip(neurons, names, steps, strict=True)
        ],
    }
    data["tokens"] = [
        shown_token(tokenizer, token) if token < tokenizer.n_vocab else f"[{token}]"  # a prompt may hold any
        for token in table
    ]
    data["gap"] = gap_of(tokenizer)
    return Viewer(title, tuple((layer, int(neuron)) for neuron in neurons), _fragment(title, colour, data))


def _check(
    prompts: Tensor,
    neurons: Tensor,
    maxima: Tensor,
    targets: Tensor,
    found: Frontier,
    names: Sequence[str],
    strengths: Sequence[float],
    colour: str,
    n_tokens: int,
    n_new: int,
) -> None:
    m, given = len(neurons), (len(maxima), len(targets), len(names), found.lift.shape[1])
    if not m or not len(prompts) or any(n != m for n in given):
        raise ValueError(f"{m} neurons need as many maxima, targets, names and measurements, and a prompt; got {given}")
    if len(found.lift) != 1 + len(strengths):
        raise ValueError(f"{len(strengths)} strengths were given, and {len(found.lift) - 1} measured")
    check_colour(colour)
    if n_tokens < 1 or n_new < 0 or not strengths:
        raise ValueError(f"n_tokens >= 1, n_new >= 0 and a strength are needed; got {n_tokens}, {n_new}, {strengths}")


def _values(model: LanguageModel, maxima: Tensor, strengths: Sequence[float]) -> Tensor:
    """(s, m) what each neuron is set to, in the model's dtype."""
    weight = model.token_embedding.weight
    maxima = maxima.to(weight.device, torch.float32)
    values = torch.outer(torch.tensor(strengths, dtype=torch.float32, device=weight.device), maxima).to(weight.dtype)
    if not bool(values.isfinite().all()):
        raise ValueError(f"maxima and strengths must be finite; got {maxima.tolist()} and {list(strengths)}")
    return values


def _chances(
    model: LanguageModel, prompts: Tensor, layer: int, neurons: Tensor, values: Tensor, n_vocab: int
) -> Tensor:
    """(1 + s, m, p, n_vocab) of the next token, first as it is, then under each value; on the CPU."""
    chances = torch.empty(1 + len(values), len(neurons), len(prompts), n_vocab, device="cpu")
    chances[0] = model(prompts)[:, -1].float().softmax(-1)[..., :n_vocab]
    for some, logits in steered_logits(model, prompts, layer, neurons, values):
        chances[1:, some] = logits[..., -1, :].float().softmax(-1)[..., :n_vocab].cpu()
    if not chances.isfinite().all():
        raise ValueError("the model's logits are NaN or infinite, as it is or with a neuron set")
    return chances


def _continuations(
    model: LanguageModel, prompts: Tensor, layer: int, neurons: Tensor, values: Tensor, n_vocab: int, n_new: int
) -> Tensor:
    """(1 + s, m, p, n_new) by the most probable token each time, first as it is, then under each value."""
    options = dict(temperature=0, n_vocab=n_vocab)
    plain = model.generate(prompts, n_new, **options)[:, prompts.shape[1] :]
    set_to = [generate_when_set(model, prompts, layer, neurons, value, n_new, **options) for value in values]
    return torch.stack([plain.expand(len(neurons), -1, -1), *set_to])


def _steps(
    found: Frontier, chances: Tensor, texts: Tensor, targets: Tensor, n_tokens: int, table: dict[int, int]
) -> list[list[dict]]:
    """What each neuron's slider shows, step by step; the tokens are added to the `table`."""
    n_steps, m, n_prompts, n_vocab = chances.shape
    top = chances.topk(min(n_tokens, n_vocab), -1)

    def step(i: int, j: int) -> dict:
        first = [
            [places(table, which.tolist()), _percent(share), targets[j][which].int().tolist()]
            for which, share in zip(top.indices[i, j], top.values[i, j], strict=True)
        ]
        return {
            "lift": f"{float(found.lift[i, j]) + 0.0:+.2f}",
            "off": number(float(found.off_target[i, j].clamp(min=0))),
            "next": first,
            "mass": [number(100 * chances[i, j, p][targets[j]].sum()) for p in range(n_prompts)],
            "text": [places(table, text.tolist()) for text in texts[i, j]],
        }

    return [[step(i, j) for i in range(n_steps)] for j in range(m)]


def _percent(chances: Tensor) -> list[int]:
    return (100 * chances).round().int().tolist()


def _fragment(title: str, colour: str, data: dict) -> str:
    """The tables of readers without scripts, and the data from which the script draws."""

    def join(places: Sequence[int]) -> str:
        return f"<bdi>{escape(data['gap'].join(data['tokens'][place] for place in places))}</bdi>"

    content = dict(
        label=escape(title),
        neurons="".join(f"<option>{escape(neuron['name'])}</option>" for neuron in data["neurons"]),
        prompts="".join(f"<option>… {join(prompt[-12:])[5:-6]}</option>" for prompt in data["prompts"]),
        last=len(data["strengths"]) - 1,
        prompt=join(data["prompts"][0]),
        tables="".join(_table(neuron, data["strengths"], join) for neuron in data["neurons"]),
        data=script_data(data),
    )
    made_of = [colour, content]
    return fragment("steering", content["label"], BODY.format(**content), content["data"], colour, made_of)


def _table(neuron: dict, strengths: Sequence[str], join: Callable[[Sequence[int]], str]) -> str:
    """What the slider shows of one neuron on the first prompt, a row a strength."""
    rows = ""
    for strength, step in zip(strengths, neuron["steps"], strict=True):
        tokens, percent, _ = step["next"][0]
        mass = step["mass"][0]
        first = ", ".join(f"{join([t])} {n} %" for t, n in zip(tokens[:4], percent, strict=False))
        rows += (
            f'<tr><th scope="row">{escape(strength)}</th><td>{first}</td><td>{mass} %</td>'
            f"<td>{join(step['text'][0])}</td><td>{step['lift']}</td><td>{step['off']}</td></tr>"
        )
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    return f"<table><caption>{escape(neuron['name'])}</caption><tr>{heads}</tr>{rows}</table>"
