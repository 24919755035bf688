"""What an auto-encoder keeps of the neurons and of the model's predictions, and how sparse its code is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.devices import check_floating, exact, exact_sum
from cratelab.language_model import LanguageModel
from cratelab.reading import NO_TOKEN, Text, texts, tokens_to_read
from cratelab.sae.autoencoder import Sae
from cratelab.sae.splicing import on_device, sae_facts, splice
from cratelab.shared_pass import RunningSums, model_facts, open_pass, text_facts


@dataclass
class SaeScores:
    """One auto-encoder on one text. No number of these says much without the others.

    Attributes:
        l0: active features a token.
        explained_variance: 1 − Σ‖x − x̂‖²/Σ‖x − x̄‖² (eq-10-5); 0 for one that always returns the mean x̄; NaN where
            the neurons never change, as in a dead layer.
        ce_clean: nats a token of the model as it is.
        ce_spliced: with the reconstruction in the place of this layer's neurons, the others as they are.
        ce_zero: with zeros in their place.
        density: (m,) float64 on the CPU, the share of tokens on which each feature is active.
        n_tokens: tokens read.
    """

    l0: float
    explained_variance: float
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    density: Tensor
    n_tokens: int

    @property
    def recovered(self) -> float:
        """Loss recovered, (CE_zero − CE_spliced)/(CE_zero − CE_clean) (eq-10-6); NaN where zeros cost nothing."""
        cost = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_spliced) / cost if cost else float("nan")

    @property
    def dead(self) -> float:
        """Share of features that are active on none of the `n_tokens`."""
        return float((self.density == 0).double().mean())

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Live features by density: how many in each bin, and the bins' edges in log10, a quarter of a decade apart."""
        lowest = np.floor(-np.log10(self.n_tokens))
        return np.histogram(self.density[self.density > 0].log10().cpu(), np.arange(lowest, 0.125, 0.25))


@torch.no_grad()
def evaluate_sae(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    saes: dict[int, Sae],
    n_tokens: int | None = None,
    batch: int = 16,
    first: bool = True,
    folder: str | Path | None = None,
) -> dict[int, SaeScores]:
    """Score the auto-encoder of each layer, spliced in alone; for several at once see `cross_entropy`.

    With a `folder` the processes that Accelerate or torchrun have started share the text, and a killed call goes on
    where it stopped; all is what one process finds, but for the order of sums in double precision.

    Args:
        model: any, on any device.
        corpus: text that neither has seen; read as `cratelab.reading.watch_neurons` reads it.
        saes: by layer, counted from 0.
        n_tokens: read this many tokens at most.
        batch: pieces at a time; the largest tensor is (batch, context, m).
        first: whether l0, explained variance, density and `n_tokens` count the first token of each piece, at which many
            language models put a few activations so large that they are most of the variance. The cross-entropies
            begin with the second in any case.
        folder: as for `collect_records`; without one, every process reads all of the text.

    Returns:
        The scores by layer; the same in each process.

    Raises:
        ValueError: the corpus has tokens that the model does not know, or none to predict; an auto-encoder does not
            fit its layer; activations or the model's own cross-entropy are not finite; or a file in `folder` is
            damaged, or an auto-encoder no `torch.nn.Module`, so that the folder cannot tell it from another.
        OSError: `folder` cannot be written.
    """
    with splice(model, saes):
        pass  # raises before any work
    check_text(model, corpus, n_tokens)
    device = model.token_embedding.weight.device
    watched = {layer: _Watched(layer, on_device(sae, device)) for layer, sae in saes.items()}
    total = tokens_to_read(corpus, n_tokens)

    def made_from() -> list:
        facts = [[layer, sae_facts(sae)] for layer, sae in saes.items()]
        return ["sae", model_facts(model), text_facts(corpus), total, batch, first, facts]

    with open_pass(RunningSums, total, folder, made_from) as reading:
        for text in _texts(model, corpus, n_tokens, batch, reading.wanted):
            counted = text.present & (first | (torch.arange(text.present.shape[1], device=device) > 0))
            sums = {"clean": _nats(model, text), "count": int(text.present[:, 1:].sum()), "n": int(counted.sum())}
            for layer, sae in watched.items():
                with splice(model, {layer: sae}):
                    spliced = _nats(model, text)
                with splice(model, {layer: _Zero(sae.config)}):
                    zero = _nats(model, text)
                here = sae.sums(counted) | {"spliced": spliced, "zero": zero}
                sums |= {f"{layer} {name}": value for name, value in here.items()}
            reading.running.add(text.number, text.n_tokens, sums)
            reading.keep()
        sums = reading.merged().sums
    if not sums["clean"].isfinite():
        raise ValueError(f"the model's own cross-entropy is {sums['clean']}: is it damaged, or did it diverge?")
    return {layer: _scores(sums, layer) for layer in saes}


@torch.no_grad()
def cross_entropy(model: LanguageModel, corpus: TokenizedCorpus, n_tokens: int | None = None, batch: int = 16) -> float:
    """Nats a token, given those before it in its piece of the document; `splice` around it prices any splice.

    Args:
        model: on any device.
        corpus: read as `evaluate_sae` reads it.
        n_tokens: read this many tokens at most.
        batch: pieces at a time.

    Raises:
        ValueError: the corpus has tokens that the model does not know, or none to predict.
    """
    check_text(model, corpus, n_tokens)
    each = ((_nats(model, text), int(text.present[:, 1:].sum())) for text in _texts(model, corpus, n_tokens, batch))
    nats, counts = zip(*each, strict=True)
    return sum(nats) / sum(counts)


def check_text(model: LanguageModel, corpus: TokenizedCorpus, n_tokens: int | None = None) -> None:
    """Raises ValueError if `evaluate_sae` could not read the corpus."""
    longest = next(_texts(model, corpus, n_tokens, 1))
    if longest.tokens.shape[1] < 2:
        total = tokens_to_read(corpus, n_tokens)
        raise ValueError(f"the first {total} tokens of the corpus hold none that follows another: read more of them")


def _texts(
    model: LanguageModel,
    corpus: TokenizedCorpus,
    n_tokens: int | None,
    batch: int,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[Text]:
    """All pieces, the longest first, which leaves less padding."""
    check_floating(model)
    return texts(model, corpus, batch, n_tokens=n_tokens, ahead=None, wanted=wanted)


def _nats(model: LanguageModel, text: Text) -> float:
    """Of all tokens of the text but the first of each piece, together."""
    logits = model(text.tokens.clamp(min=0))[:, :-1]
    nats = F.cross_entropy(logits.mT.float(), text.tokens[:, 1:], ignore_index=NO_TOKEN, reduction="none")
    return float(exact_sum(nats))


class _Watched:
    """Stands for an auto-encoder, and sees what it does."""

    def __init__(self, layer: int, sae: Sae):
        self.layer, self.sae, self.config, self.decode = layer, sae, sae.config, sae.decode

    def encode(self, x: Tensor) -> Tensor:
        self.x, self.code = x, self.sae.encode(x)
        return self.code

    def sums(self, counted: Tensor) -> dict[str, Tensor]:
        """Of what was encoded last, over the tokens (b, n) that count."""
        x, code = self.x[counted], self.code[counted]
        if not x.isfinite().all():
            raise ValueError(f"activations of layer {self.layer} are not finite: is the model damaged?")
        errors, x = exact(x - self.decode(code)), exact(x)
        return {
            "sum": x.sum(0),
            "squares": x.square().sum(0),
            "errors": errors.square().sum(0),
            "active": exact((code > 0).sum(0)),
        }


def _scores(sums: dict[str, Tensor], layer: int) -> SaeScores:
    n, count = sums["n"], sums["count"]
    own = {name.removeprefix(f"{layer} "): value for name, value in sums.items() if name.startswith(f"{layer} ")}
    variance = float((own["squares"] - own["sum"].square() / n).sum())
    changes = variance > 1e-12 * float(own["squares"].sum())  # else it is rounding
    return SaeScores(
        l0=float(own["active"].sum() / n),
        explained_variance=1 - float(own["errors"].sum()) / variance if changes else float("nan"),
        ce_clean=float(sums["clean"] / count),
        ce_spliced=float(own["spliced"] / count),
        ce_zero=float(own["zero"] / count),
        density=own["active"] / n,
        n_tokens=int(n),
    )


class _Zero:
    """Stands for an auto-encoder that returns zeros."""

    def __init__(self, config):
        self.config = config

    encode = staticmethod(torch.Tensor.clone)
    decode = staticmethod(torch.zeros_like)
