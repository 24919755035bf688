"""Neurons to push with a slider: what comes next as each of them is set to growing multiples of its maximum.

Everything is computed beforehand and travels in one piece of HTML, as in `cratelab.viewers.neurons`: nothing is
fetched, everything is escaped. Where scripts do not run, a table for each neuron shows the same.
"""

import hashlib
import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from cratelab.corpora.tokenizers import Tokenizer
from cratelab.language_model import LanguageModel
from cratelab.plots import CRATE
from cratelab.steering import STRENGTHS, Frontier, generate_when_set, steered_logits
from cratelab.viewers.frame import escape, number, script_data, visible
from cratelab.viewers.neurons import Viewer, _token_text


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
    m, given = len(neurons), (len(maxima), len(targets), len(names), found.lift.shape[1])
    if not m or not len(prompts) or any(n != m for n in given):
        raise ValueError(f"{m} neurons need as many maxima, targets, names and measurements, and a prompt; got {given}")
    if len(found.lift) != 1 + len(strengths):
        raise ValueError(f"{len(strengths)} strengths were given, and {len(found.lift) - 1} measured")
    if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        raise ValueError(f"colour must be #rrggbb, such as {CRATE}; got {colour!r}")
    if n_tokens < 1 or n_new < 0 or not strengths:
        raise ValueError(f"n_tokens >= 1, n_new >= 0 and a strength are needed; got {n_tokens}, {n_new}, {strengths}")
    weight = model.token_embedding.weight
    prompts, maxima, targets = prompts.to(weight.device), maxima.to(weight.device, torch.float32), targets.cpu()
    strong = torch.tensor(strengths, dtype=torch.float32, device=weight.device)
    values = torch.outer(strong, maxima).to(weight.dtype)
    if not bool(values.isfinite().all()):
        raise ValueError(f"maxima and strengths must be finite; got {maxima.tolist()} and {list(strengths)}")
    shown_vocabulary = min(model.config.vocab_size, tokenizer.n_vocab)
    if targets.dtype != torch.bool or targets.shape[1] < shown_vocabulary:
        given = f"{targets.dtype} of {targets.shape[1]}"
        raise ValueError(f"targets must be torch.bool, and mark all {shown_vocabulary} tokens; got {given}")
    targets = targets[:, :shown_vocabulary]
    chances = torch.empty(1 + len(values), m, len(prompts), shown_vocabulary, device="cpu")
    chances[0] = model(prompts)[:, -1].float().softmax(-1)[..., :shown_vocabulary]
    for some, logits in steered_logits(model, prompts, layer, neurons, values):
        chances[1:, some] = logits[..., -1, :].float().softmax(-1)[..., :shown_vocabulary].cpu()
    if not chances.isfinite().all():
        raise ValueError("the model's logits are NaN or infinite, as it is or with a neuron set")
    sampling = dict(temperature=0, n_vocab=shown_vocabulary)
    plain = model.generate(prompts, n_new, **sampling)[:, prompts.shape[1] :]
    texts = torch.stack(
        [plain.expand(m, -1, -1)]
        + [generate_when_set(model, prompts, layer, neurons, value, n_new, **sampling) for value in values]
    )
    top = chances.topk(min(n_tokens, shown_vocabulary), -1)

    table: dict[int, int] = {}  # token -> its place among those shown

    def places(tokens: Tensor) -> list[int]:
        return [table.setdefault(token, len(table)) for token in tokens.tolist()]

    shown = [
        {
            "name": visible(f"layer {layer}, neuron {int(neuron)}: {names[j]}"),
            "steps": [
                {
                    "lift": f"{float(found.lift[i, j]) + 0.0:+.2f}",
                    "off": number(float(found.off_target[i, j].clamp(min=0))),
                    "next": [
                        [places(top.indices[i, j, p]), _percent(top.values[i, j, p]), _marks(targets[j], top, i, j, p)]
                        for p in range(len(prompts))
                    ],
                    "mass": [number(100 * chances[i, j, p][targets[j]].sum()) for p in range(len(prompts))],
                    "text": [places(texts[i, j, p]) for p in range(len(prompts))],
                }
                for i in range(1 + len(strengths))
            ],
        }
        for j, neuron in enumerate(neurons)
    ]
    data = {
        "prompts": [places(prompt) for prompt in prompts],
        "strengths": ["as it is", *(f"set to {number(s)} × its maximum" for s in strengths)],
        "neurons": shown,
    }
    data["tokens"] = [
        _token_text(tokenizer, token) if token < tokenizer.n_vocab else f"[{token}]"  # a prompt may hold any
        for token in table
    ]
    data["gap"] = " " if tokenizer.decode([0, 0]) != 2 * tokenizer.decode([0]) else ""
    indices = tuple((layer, int(neuron)) for neuron in neurons)
    return Viewer(title, indices, _fragment(title, colour, data))


def _percent(chances: Tensor) -> list[int]:
    return (100 * chances).round().int().tolist()


def _marks(targets: Tensor, top, i: int, j: int, p: int) -> list[int]:
    return targets[top.indices[i, j, p]].int().tolist()


def _fragment(title: str, colour: str, data: dict) -> str:
    """The tables of readers without scripts, and the data from which the script draws."""

    def join(places: Sequence[int]) -> str:
        return f"<bdi>{escape(data['gap'].join(data['tokens'][place] for place in places))}</bdi>"

    tables = ""
    for neuron in data["neurons"]:
        rows = ""
        for strength, step in zip(data["strengths"], neuron["steps"], strict=True):
            tokens, percent, _ = step["next"][0]
            mass = step["mass"][0]
            first = ", ".join(f"{join([t])} {n} %" for t, n in zip(tokens[:4], percent, strict=False))
            rows += (
                f'<tr><th scope="row">{escape(strength)}</th><td>{first}</td><td>{mass} %</td>'
                f"<td>{join(step['text'][0])}</td><td>{step['lift']}</td><td>{step['off']}</td></tr>"
            )
        heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
        tables += f"<table><caption>{escape(neuron['name'])}</caption><tr>{heads}</tr>{rows}</table>"
    content = dict(
        label=escape(title),
        neurons="".join(f"<option>{escape(neuron['name'])}</option>" for neuron in data["neurons"]),
        prompts="".join(f"<option>… {join(prompt[-12:])[5:-6]}</option>" for prompt in data["prompts"]),
        last=len(data["strengths"]) - 1,
        prompt=join(data["prompts"][0]),
        tables=tables,
        data=script_data(data),
    )
    name = "steering-" + hashlib.sha256(json.dumps([colour, content]).encode()).hexdigest()[:10]
    style = STYLE.replace("ROOT", f".{name}").replace("COLOUR", colour)
    return FRAGMENT.format(name=name, style=style, script=SCRIPT.replace("ROOT", f".{name}"), **content)


HEADS = "the neuron is", "most probable next tokens", "all targets", "continuation", "lift, nats", "off target, nats"

FRAGMENT = """\
<div class="{name} mathjax_ignore tex2jax_ignore notranslate" translate="no" role="group" aria-label="{label}">
<style>{style}</style>
<div class="title">{label}</div>
<div class="bar" hidden><label>neuron <select class="neuron">{neurons}</select></label>
<label>text <select class="prompt">{prompts}</select></label></div>
<div class="bar" hidden><label class="slide">strength <input type="range" min="0" max="{last}" value="0"></label>
<output></output></div>
<p><small>text so far</small> <span class="given">{prompt}</span><span class="goes"></span></p>
<div class="next" role="status" hidden></div>
<div class="facts" hidden></div>
<div class="tables">{tables}</div>
<script type="application/json">{data}</script>
<script>{script}</script>
</div>"""

# The theme of the page around must not shine through: what it sets on an element is set here.
STYLE = """
ROOT{all:initial;display:block;box-sizing:border-box;max-width:60em;margin:.5em 0;padding:.8em 1em;direction:ltr;
 border:1px solid #ccc;border-radius:8px;background:#fff;color:#1a1a1a;color-scheme:light;
 font:14px/1.5 system-ui,sans-serif;overflow-x:auto}
/* The book's theme gives outputs a grey panel in dark mode; this one has its own ground. */
.text_html:has(> ROOT){background:none!important;padding:0!important}
ROOT [hidden]{display:none!important}
ROOT .title{font-weight:600;font-size:1.1em;margin-bottom:.5em}
ROOT small{color:#555;font-size:.85em}
ROOT .bar{display:flex;flex-wrap:wrap;gap:.4em 1em;align-items:center;margin-bottom:.5em}
ROOT label{display:flex;flex-wrap:wrap;gap:.2em .5em;align-items:center;min-width:0;max-width:100%}
ROOT select{font:inherit;color:inherit;background:#f4f4f4;border:1px solid #999;border-radius:5px;max-width:100%;
 padding:.25em .7em;margin:0;min-height:2.2em;cursor:pointer}
ROOT .slide{flex:1 1 16em}
ROOT input{flex:1 1 10em;min-width:0;height:2.2em;margin:0;accent-color:COLOUR;cursor:pointer}
ROOT output{flex:0 0 13em}
ROOT :focus-visible{outline:2px solid #000;outline-offset:1px}
ROOT p{margin:.4em 0;color:inherit;font:inherit;overflow-wrap:anywhere}
ROOT .goes:empty{display:none}
ROOT .goes{background:#eee;border-radius:3px;margin-left:.3em;padding:.1em .2em}
ROOT .next div{display:grid;grid-template-columns:8em 1fr 4.5em;gap:.6em;align-items:center}
ROOT .next bdi{text-align:right;overflow-wrap:anywhere}
ROOT .next i{display:block;height:1em;min-width:1px;background:#999;print-color-adjust:exact;
 forced-color-adjust:none}
ROOT .next .target i{background:COLOUR}
ROOT .next .target bdi{font-weight:600}
ROOT .next .all{border-top:1px solid #ccc;margin-top:.2em;padding-top:.2em}
ROOT .facts{margin-top:.5em;border-top:1px solid #ccc;padding-top:.4em}
ROOT table{border-collapse:collapse;margin:.8em 0;color:inherit;font:inherit;background:none}
ROOT caption{text-align:left;font-weight:600;color:inherit}
ROOT th,ROOT td{border:1px solid #ccc;padding:.2em .5em;text-align:left;vertical-align:top;font:inherit;color:inherit;
 background:none}
"""

SCRIPT = """
for (const root of document.querySelectorAll('ROOT:not([data-live])')) {
  root.dataset.live = '';
  const find = what => root.querySelector(what), data = JSON.parse(find('script').textContent);
  const [neuron, prompt, slider, says] = ['.neuron', '.prompt', 'input', 'output'].map(find);
  const join = places => places.map(place => data.tokens[place]).join(data.gap);
  const make = (tag, facts, ...inside) => {
    const made = Object.assign(document.createElement(tag), facts);
    made.append(...inside);
    return made;
  };
  const show = () => {
    const p = prompt.selectedIndex, step = data.neurons[neuron.selectedIndex].steps[slider.value];
    const [tokens, percent, marks] = step.next[p];
    says.textContent = data.strengths[slider.value];
    slider.setAttribute('aria-valuetext', says.textContent);
    find('.given').replaceChildren(make('bdi', {}, join(data.prompts[p])));
    find('.goes').replaceChildren(make('bdi', {}, join(step.text[p])));
    find('.next').replaceChildren(...tokens.map((token, i) => {
      const bar = make('i', {});
      bar.style.width = `${percent[i]}%`;
      const value = make('span', {}, `${percent[i]} %`), name = make('bdi', {}, data.tokens[token]);
      return make('div', {className: marks[i] ? 'target' : ''}, name, make('span', {}, bar), value);
    }));
    const all = make('i', {}), mass = step.mass[p];
    all.style.width = `${mass}%`;
    find('.next').append(make('div', {className: 'target all'}, make('bdi', {}, 'all targets'),
      make('span', {}, all), make('span', {}, `${mass} %`)));
    find('.facts').textContent = `Over all contexts: lift of the targets (bold) ${step.lift} nats, ` +
      `off-target divergence ${step.off} nats.`;
  };
  for (const control of [neuron, prompt, slider]) control.addEventListener('input', show);
  for (const part of root.querySelectorAll('.bar,.next,.facts')) part.hidden = false;
  find('.tables').hidden = true;
  show();
}
"""
