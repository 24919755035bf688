"""All neurons of a model under all protocols: records, explanations, scores, and the controls beside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import Explainer, Explanations, shuffle
from cratelab.interpret.records import Records, collect_records
from cratelab.interpret.scores import PROTOCOLS, Scores, ScoringProtocol, needs, score, split
from cratelab.intervals import interval_over_neurons
from cratelab.language_model import LanguageModel
from cratelab.models import untrained  # noqa: F401  the row that belongs beside each of these


@dataclass
class Evaluation:
    """What one explainer reaches under one protocol.

    Attributes:
        protocol: which.
        explainer: its name.
        scores: of all neurons.
        control: of all neurons, each simulated by the explanation of another neuron of its layer.
        explanations: what was said.
    """

    protocol: ScoringProtocol
    explainer: str
    scores: Scores
    control: Scores
    explanations: Explanations

    def row(self, layers: Iterable[int] | None = None) -> dict:
        """The numbers to report, scores × 100; over all layers, or some: the paper leaves the last out at 6 and 12.

        layers are the means of each, mean and variance those of layers (eq-09-1). All three and interval count neurons
        without a score as 0; mean_defined leaves them out, as the paper does, and is NaN if a layer has none with a
        score; undefined is their share, dead the share that is so because the neuron is constant. within_token and
        within_control are means as mean and control are, of what the current token does not explain.

        Raises:
            ValueError: there is no such layer, or none is asked for.
        """
        n_layers = len(self.scores.correlation)
        layers = list(range(n_layers) if layers is None else layers)
        if not layers or not all(-n_layers <= layer < n_layers for layer in layers):
            raise ValueError(f"row needs layers below {n_layers}, at least one; got {layers}")
        means, held = self.scores.by_layer()[layers], self.scores.correlation[layers]
        return {
            "protocol": self.protocol,
            "explainer": self.explainer,
            "layers": [round(mean, 3) for mean in means.tolist()],
            "mean": float(means.mean()),
            "interval": list(interval_over_neurons(held.nan_to_num(0))),
            "variance": float(means.var(correction=0)),
            "mean_defined": float(self.scores.by_layer(undefined_as_zero=False)[layers].mean()),
            "within_token": float(100 * self.scores.within_token[layers].nan_to_num(0).mean()),
            "within_control": float(100 * self.control.within_token[layers].nan_to_num(0).mean()),
            "rank_mean": float(100 * self.scores.rank_correlation[layers].nan_to_num(0).mean()),
            "undefined": float(held.isnan().double().mean()),
            "dead": float(self.scores.dead[layers].double().mean()),
            "coverage": float(self.scores.coverage[layers].mean()),
            "control": float(self.control.by_layer()[layers].mean()),
        }


def collect_for_protocols(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    protocols: Iterable[ScoringProtocol] = PROTOCOLS,
    *,
    as_published: bool = False,
    n_tokens: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> dict[ScoringProtocol, Records]:
    """The records that each protocol needs; those of equal windows are collected once.

    Args:
        model: any with `neurons`, on any device.
        corpus: text it was not trained on.
        protocols: which.
        as_published: as for `collect_records` and `split`.
        n_tokens: to read at most.
        seed: of the random excerpts.
        folder: as for `collect_records`, by which several processes share the reading and a killed call goes on.

    Raises:
        ValueError: there is no such protocol, or none is given; or as `collect_records`, whose other errors come too.
    """
    protocols = list(protocols)
    if not protocols:
        raise ValueError(f"no protocol is given; there are {', '.join(PROTOCOLS)}")
    asks = {protocol: needs(protocol, as_published=as_published) for protocol in protocols}
    found: dict[ScoringProtocol, Records] = {}
    by_window: dict[int, Records] = {}
    for protocol, asked in asks.items():
        window = asked["window"]
        if window not in by_window:
            by_window[window] = collect_records(
                model, corpus, **asked, seed=seed, as_published=as_published, n_tokens=n_tokens, folder=folder
            )
        found[protocol] = by_window[window]
    return found


def evaluate(
    records: dict[ScoringProtocol, Records], explainers: dict[str, Explainer], *, as_published: bool = False
) -> list[Evaluation]:
    """Explain and score every neuron under every protocol that there are records for.

    Args:
        records: from `collect_for_protocols`.
        explainers: by the name they are reported under.
        as_published: as the records were collected.

    Returns:
        One evaluation for each protocol and explainer, protocols first.

    Raises:
        ValueError: there are no records or no explainers, or the records hold too few excerpts for a protocol.
    """
    if not records or not explainers:
        raise ValueError(f"evaluate needs records and explainers; got {list(records)} and {list(explainers)}")
    parts = {protocol: split(held, protocol, as_published=as_published) for protocol, held in records.items()}
    found: list[Evaluation] = []
    last: tuple[Excerpts, dict[str, Explanations]] | None = None  # top-and-random and random-only explain from the same
    for protocol, (explaining, validation) in parts.items():
        if last is None or not all(map(torch.equal, vars(last[0]).values(), vars(explaining).values())):
            last = explaining, {name: explainer.explain(explaining) for name, explainer in explainers.items()}
        for name, explanations in last[1].items():
            simulated, coverage = explanations.simulate(validation)
            other, other_coverage = shuffle(explanations, validation)
            found.append(
                Evaluation(
                    protocol,
                    name,
                    score(simulated, validation, coverage),
                    score(other, validation, other_coverage),
                    explanations,
                )
            )
    return found
