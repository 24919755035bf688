"""Which neurons are steered, which tokens are to be lifted, and which are their controls."""

import numpy as np
import torch
from torch import Tensor

from cratelab.arguments import check_seed, check_whole
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.language_model import LanguageModel
from cratelab.reading import check_size
from cratelab.steering.effects import direct_effect


def draw_live(maxima: Tensor, n: int, seed: int = 0) -> Tensor:
    """At most n of the neurons (h,) whose maximum is positive, drawn at random, ascending.

    Raises:
        ValueError: `n` is less than 1, `seed` is out of range, or `maxima` are not finite.
    """
    check_whole("n", n)
    check_seed(seed)
    if not maxima.isfinite().all():
        raise ValueError(f"draw_live needs finite maxima; got {maxima.tolist()}")
    live = (maxima > 0).nonzero()[:, 0].cpu().numpy()
    drawn = np.random.default_rng(seed).permutation(live)[:n]
    return torch.from_numpy(np.sort(drawn)).to(maxima.device)


def most_raised(effects: Tensor, n: int, n_vocab: int) -> Tensor:
    """The n tokens below `n_vocab` with the largest effect for each neuron, (m, v) to (m, v) bool.

    Rows of the unembedding from `n_vocab` on only fill it up: no text holds their tokens.

    Raises:
        ValueError: `effects` are NaN somewhere, or not 1 <= n <= n_vocab <= v.
    """
    check_whole("n", n)
    if not n <= n_vocab <= effects.shape[1] or effects.isnan().any():
        raise ValueError(
            f"most_raised needs effects that are numbers, and 1 <= n <= n_vocab <= {effects.shape[1]}; got n={n}, "
            f"n_vocab={n_vocab}, {int(effects.isnan().sum())} NaN"
        )
    return torch.zeros_like(effects, dtype=torch.bool).scatter_(1, effects[:, :n_vocab].topk(n, 1).indices, True)


def neuron_that_raises_most(model: LanguageModel, layer: int, maxima: Tensor, n: int, n_vocab: int) -> int:
    """The neuron of a layer that by its atom, set to its maximum (h,), raises its n tokens below `n_vocab` most."""
    effects = direct_effect(model, layer, torch.arange(len(maxima)))[:, :n_vocab]
    return int((effects.topk(n).values.mean(1) * maxima).argmax())


def token_counts(corpus: TokenizedCorpus, v: int) -> Tensor:
    """(v,) how often each token stands in a corpus that fits into memory.

    Raises:
        ValueError: the corpus has more than v tokens.
    """
    check_size(corpus, v)
    return torch.from_numpy(np.bincount(corpus[:], minlength=v))


def control_tokens(targets: Tensor, counts: Tensor, n_bins: int = 20, seed: int = 0) -> Tensor:
    """Random tokens that are no targets, as many and as frequent as the targets of each neuron, (m, v) bool.

    The vocabulary is ordered by frequency and cut into equal bins. From each bin as many tokens are drawn as it has
    targets, or all that are left.

    Args:
        targets: (m, v) bool.
        counts: (v,) frequencies.
        n_bins: how many bins.
        seed: of the draw.

    Raises:
        ValueError: targets are not (m, v) bool, counts not (v,), there is no bin, or `seed` is out of range.
    """
    check_whole("n_bins", n_bins)
    check_seed(seed)
    if targets.dtype != torch.bool or targets.ndim != 2 or counts.shape != targets.shape[1:]:
        raise ValueError(
            "control_tokens needs targets (m, v) of bool and counts (v,); "
            f"got {tuple(targets.shape)} {targets.dtype} and {tuple(counts.shape)}"
        )
    keys = torch.from_numpy(np.random.default_rng(seed).random(targets.shape, dtype=np.float32)).to(targets.device)
    keys = keys.masked_fill(targets, 2)  # drawn last
    controls = torch.zeros_like(targets)
    for tokens in counts.argsort(stable=True).to(targets.device).tensor_split(n_bins):
        taken = targets[:, tokens].sum(1, keepdim=True)
        rank = keys[:, tokens].argsort(1).argsort(1)
        controls[:, tokens] = (rank < taken) & ~targets[:, tokens]
    return controls
