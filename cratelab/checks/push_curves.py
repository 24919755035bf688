"""Lift and off-target divergence against the strength of a push, down and up: what exercise 11.E holds drawings to."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from cratelab import steering
from cratelab.corpora import tinyworld
from cratelab.experiments.reference_models import load_reference

STRENGTHS = -64.0, -8.0, -1.0, -0.1, -0.05, 0.0, 0.05, 0.1, 1.0, 8.0, 64.0
LAYER, N_NEURONS = 1, 30


@cache
def push_curves(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What `STRENGTHS` times its own maximum, added to a neuron at all tokens, does in the packaged toys; in nats.

    Of thirty neurons of the second layer, drawn by `seed`, which also picks the toys and the text; the targets are the
    ten words that each atom raises most. Some seconds, once.

    Returns:
        Medians over neurons, those of the lift (eq-11-5), "lift, CRATE" and "lift, GPT-2", and of the divergence
        (eq-11-7), "off target, CRATE" and "off target, GPT-2", each (11,); and for "CRATE" and "GPT-2" the median of
        the mean of -log p(T), above which no lift gets.
    """
    corpus = tinyworld.generate(20_000, seed=100 + seed, context=128).corpus()
    spans = map(corpus.document_span, range(corpus.n_documents))
    starts = [start for start, stop in spans if stop - start >= 64][:4]
    contexts = torch.from_numpy(np.stack([corpus[start : start + 64] for start in starts]).astype("int64"))
    curves, highest = {}, {}
    for name, label in ("crate", "CRATE"), ("gpt2", "GPT-2"):
        model = load_reference(name, "toy", seed).float().requires_grad_(False)
        maxima = steering.neuron_maxima(model, corpus)[LAYER]
        neurons = steering.draw_live(maxima, N_NEURONS, seed)
        targets = steering.most_raised(steering.direct_effect(model, LAYER, neurons), 10, corpus.n_vocab)
        values = torch.outer(torch.tensor(STRENGTHS, dtype=maxima.dtype, device="cpu"), maxima[neurons])
        clean = model(contexts).double().log_softmax(-1)
        rows = []
        for some, logits in steering.steered_logits(model, contexts, LAYER, neurons, values, "add"):
            for pushed, which in zip(logits.double().unbind(1), targets[some], strict=True):
                rows.append([*_lift_and_divergence(clean, pushed.log_softmax(-1), which)])
        for i, what in enumerate(["lift", "off target"]):
            curves[f"{what}, {label}"] = torch.stack([row[i] for row in rows]).median(0).values.numpy()
        before = [-float(clean[..., which].logsumexp(-1).mean()) for which in targets]
        highest[label] = float(np.median(before))
    return curves, highest


def _lift_and_divergence(p: Tensor, q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Means over all tokens, (s,) each; log-probabilities (b, n, v) before and (s, b, n, v) after."""
    lift = q[..., targets].logsumexp(-1) - p[..., targets].logsumexp(-1)
    p, q = (x[..., ~targets].log_softmax(-1) for x in (p, q))
    return lift.mean((1, 2)), (p.exp() * (p - q)).sum(-1).mean((1, 2))
