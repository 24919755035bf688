"""Checks of the exercises of chapter 10: what an auto-encoder returns, keeps, explains, and learns from."""

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from functools import partial, wraps

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cratelab.checks import watching
from cratelab.checks.broken_runs import FAULT_OF, broken_runs, train
from cratelab.checks.grading import CheckFailed, call, grade, number, predict, random
from cratelab.checks.hunting import judge
from cratelab.sae import Sae


def _sae(n: int, h: int, m: int, seed: int) -> tuple:
    """Tokens, the four parameters and a feature; the weights of the decoder are not those of the encoder."""
    shapes = (n, h), (h, m), (m,), (m, h), (h,)
    return *(random(*shape, seed=seed + i) for i, shape in enumerate(shapes)), seed % m


# the last: one token, fewer features than neurons, and the first feature
SAES = [_sae(9, 4, 10, seed=1), _sae(6, 5, 7, seed=12), _sae(12, 3, 8, seed=23), _sae(1, 6, 4, seed=12)]


def _codes(n: int, m: int, seed: int, shift: float = 0) -> Tensor:
    """Entries of any sign, without ties; the largest are not spread evenly over the tokens."""
    return random(n, m, seed=seed) * torch.linspace(0.5, 3, n, dtype=torch.float64, device="cpu")[:, None] + shift


_TIED = random(4, 5, seed=5)
_TIED[[0, 1, 2, 3, 0, 3, 1], [1, 4, 0, 2, 3, 4, 2]] = torch.tensor([9.0, 8, 7, 6, 5, 4, 3], device="cpu").double()
_TIED[[2, 3], [3, 0]] = 2.5  # the 8th and the 9th
CODES = [
    (_codes(6, 9, seed=1), 2),
    (_codes(8, 5, seed=2), 1),
    (_codes(7, 6, seed=3, shift=-2.5), 3),
    (_codes(5, 4, seed=4), 4),
    (_TIED, 2),
    (1e-6 * _codes(4, 6, seed=6), 2),
    (_codes(1, 7, seed=7), 3),
    (_codes(3, 4, seed=8), 6),  # more than there are
    (_codes(3, 4, seed=9, shift=20), 4),
]


def _activity(n: int, h: int, lengths: list[int], seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens whose mean drifts and whose neurons differ in spread, and a reconstruction that is biased."""
    x = random(n, h, seed=seed) * torch.linspace(0.5, 2, h, dtype=torch.float64, device="cpu")
    x = x + 2 + torch.linspace(0, 3, n, dtype=torch.float64, device="cpu")[:, None] * random(h, seed=seed + 1)
    return x, 0.9 * x + 0.3 * random(n, h, seed=seed + 2) + 0.2, lengths


ACTIVITY = [
    _activity(50, 4, [12, 12, 12, 12, 2], seed=1),
    _activity(37, 6, [10, 10, 10, 7], seed=11),
    _activity(23, 3, [23], seed=21),
    _activity(30, 5, [3, 14, 2, 11], seed=31),
]
ROWS = [(random(5, 4, seed=i), (1 + i) * random(5, 4, seed=10 + i)) for i in range(3)]


def without_feature(function: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 10.A: a reconstruction without one feature, against adding up the others one by one."""

    def one_by_one(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, j: int) -> np.ndarray:
        out = np.tile(b_dec.numpy(), (len(x), 1))
        for t, token in enumerate(x.tolist()):
            for i in range(len(b_enc)):
                drive = sum((a - b) * w for a, b, w in zip(token, b_dec.tolist(), W_enc[:, i].tolist(), strict=True))
                if i != j and drive + float(b_enc[i]) > 0:
                    out[t] += (drive + float(b_enc[i])) * W_dec[i].numpy()
        return out

    def variant(
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        j: int,
        sign_in: float = -1,
        sign_out: float = 1,
        enc_bias: float = 1,
        relu: str = "code",
        off: str = "code",
        tied: bool = False,
        kept_error: bool = False,
    ) -> np.ndarray:
        x, W_enc, b_enc, W_dec, b_dec = (a.numpy() for a in (x, W_enc, b_enc, W_dec, b_dec))
        f = (x + sign_in * b_dec) @ (W_dec.T if tied else W_enc)
        if off == "early":
            f[:, j] = 0
        f = np.maximum(f, 0) + b_enc if relu == "early" else f + enc_bias * b_enc
        if relu in ("code", "both"):
            f = np.maximum(f, 0)
        if kept_error:
            return x - f[:, [j]] * W_dec[j]
        if off == "token":
            f[j % len(f)] = 0
        elif off == "only":
            f = f * (np.arange(f.shape[1]) == j)
        elif off == "code":
            f[:, j] = 0
        out = f @ W_dec + sign_out * b_dec
        return np.maximum(out, 0) if relu in ("both", "output") else out

    mistakes = {
        "b_dec is not subtracted from x: features describe how a token differs from it": partial(variant, sign_in=0),
        "b_dec is added to x instead of being subtracted": partial(variant, sign_in=1),
        "b_dec is missing from the reconstruction: what was subtracted has to be added again": partial(
            variant, sign_out=0
        ),
        "b_dec is neither subtracted nor added": partial(variant, sign_in=0, sign_out=0),
        "b_dec is subtracted from the reconstruction instead of being added": partial(variant, sign_out=-1),
        "b_enc is missing: it decides how much drive a feature needs": partial(variant, enc_bias=0),
        "the ReLU is missing: features would have negative activations": partial(variant, relu="none"),
        "the ReLU comes before b_enc is added: it has to come after": partial(variant, relu="early"),
        "the ReLU is applied to the reconstruction instead of the code": partial(variant, relu="output"),
        "the reconstruction is rectified too: in other networks neurons may be negative": partial(variant, relu="both"),
        "the feature is switched off before b_enc is added, which switches it on again": partial(variant, off="early"),
        "all features are active: feature j should be 0": partial(variant, off="never"),
        "only feature j is active: it is the one to be switched off": partial(variant, off="only"),
        "a token is silenced instead of a feature: tokens are rows, features columns": partial(variant, off="token"),
        "W_dec transposed encodes: the encoder has a matrix of its own": partial(variant, tied=True),
        "the feature's part is subtracted from x: start from the reconstruction, not from x": partial(
            variant, kept_error=True
        ),
    }
    grade(function, SAES, one_by_one, "adding up features one by one", mistakes)


def batch_topk(function: Callable[[Tensor, int], Tensor]) -> None:
    """Exercise 10.B: the k·n largest of a batch, against counting for each entry how many are as large."""

    mistakes = {
        "the k largest of each token are kept: that is TopK; BatchTopK ranks the whole batch": partial(_along, axis=1),
        "the k largest of each feature are kept: rank the whole batch": partial(_along, axis=0),
        "k entries of the whole batch are kept: k a token makes k·n": _with_budget(lambda k, n, m: k),
        "k·m entries are kept: the budget is k a token, so k·n": _with_budget(lambda k, n, m: k * m),
        "one entry too few: the threshold is the (k·n)-th largest and should be the next, at index k·n": _with_budget(
            lambda k, n, m: k * n - 1
        ),
        "one entry too many: the threshold is the (k·n + 2)-th largest, and indices count from 0": _with_budget(
            lambda k, n, m: k * n + 1
        ),
        "negative entries are kept where the budget is not used up: the ReLU is missing": _with_negatives,
        "the largest by absolute value are kept: the ReLU comes first": partial(_with_negatives, key=np.abs),
        "the threshold is subtracted from what is kept: that is shrinkage": lambda p, k: np.maximum(
            p.numpy() - _threshold(p, k), 0
        ),
        "the answer says which entries are kept: return the entries themselves": _with_budget(
            then=lambda f, kept: (f > 0) * kept
        ),
        "what is kept is set to 0: keep the large entries": _with_budget(then=lambda f, kept: f * ~kept.astype(bool)),
        "of equal entries at the edge all are kept, more than the budget: compare with > and the next one": (
            _with_budget(ties="all")
        ),
        "of equal entries at the edge one is kept, and which is up to the sorting: f > τ keeps none": _with_budget(
            ties="first"
        ),
        "of equal entries at the edge the last is kept, and which is up to the sorting: f > τ keeps none": _with_budget(
            ties="last"
        ),
    }
    grade(function, CODES, _counted, "counting larger entries", mistakes)


def _counted(p: Tensor, k: int) -> np.ndarray:
    p, budget = p.numpy(), k * len(p)
    as_large = np.array([[(p >= entry).sum() for entry in row] for row in p])
    return np.where((p > 0) & (as_large <= budget), p, 0)


def _ranked(p: Tensor, of: Callable, then: Callable = lambda f, kept: f * kept, ties: str = "none") -> np.ndarray:
    """Keep a number of entries that depends on (k, n, m), by place in a sorted list."""
    f = np.maximum(p.numpy(), 0)
    flat = f.ravel()
    order = np.argsort(-flat, kind="stable")
    if ties == "last":
        order = len(flat) - 1 - np.argsort(-flat[::-1], kind="stable")
    kept = np.zeros(len(flat))
    kept[order[: of(*f.shape)]] = 1
    if ties == "none" and of(*f.shape) < len(flat):
        kept = flat > flat[order[of(*f.shape)]]
    if ties == "all":
        kept = flat >= flat[order[min(of(*f.shape), len(flat)) - 1]]
    return then(f, kept.reshape(f.shape))


def _along(p: Tensor, k: int, axis: int) -> np.ndarray:
    f = np.maximum(p.numpy(), 0)
    rank = np.argsort(np.argsort(-f, axis=axis, kind="stable"), axis=axis)
    return np.where(rank < k, f, 0)


def _with_negatives(p: Tensor, k: int, key: Callable = lambda p: p) -> np.ndarray:
    """Without a ReLU, or with the largest by size."""
    p, size = p.numpy(), key(p.numpy())
    as_large = np.array([[(size >= entry).sum() for entry in row] for row in size])
    return np.where(as_large <= k * len(p), p, 0)


def _with_budget(of: Callable = lambda k, n, m: k * n, **how: object) -> Callable:
    return lambda p, k: _ranked(p, partial(of, k), **how)


def _threshold(p: Tensor, k: int) -> float:
    values = sorted(np.maximum(p.numpy(), 0).ravel(), reverse=True)
    return values[k * len(p)] if k * len(p) < len(values) else 0.0


def explained_variance(function: Callable[[Iterator[tuple[Tensor, Tensor]]], float]) -> None:
    """Exercise 10.C: explained variance of a stream of batches, against numpy on the whole."""

    @wraps(function)
    def on_stream(x: Tensor, x_hat: Tensor, lengths: list[int]) -> float:
        return function(stream(x, x_hat, lengths))

    def stream(x: Tensor, x_hat: Tensor, lengths: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        handed_out = []
        for pair in zip(x.split(lengths), x_hat.split(lengths), strict=True):
            if any(sum(reference() is not None for reference in half) > 2 for half in zip(*handed_out, strict=True)):
                raise CheckFailed(f"{function.__name__}: batches are kept: {_LET_GO}")
            own = tuple(half.clone() for half in pair)
            handed_out.append(tuple(map(weakref.ref, own)))
            before = tuple(half.clone() for half in own)
            yield own
            if not all(map(torch.equal, own, before)):
                raise CheckFailed(f"{function.__name__} changes a batch in place: compute with copies")

    def no_room(_: Callable) -> str:
        """A rule: what is held after the last batch is little beside all of them, in torch, numpy or Python."""
        lengths = [100 + i for i in range(40)]
        x, x_hat, _ = _activity(sum(lengths), 32, lengths, seed=31)
        pairs = list(zip(x.split(lengths), x_hat.split(lengths), strict=True))
        held = []

        def measured(made: _Made) -> Iterator[tuple[Tensor, Tensor]]:
            for pair in pairs:
                own = tuple(half.clone() for half in pair)
                yield own
            del own
            gc.collect()
            held.append(made.alive() + tracemalloc.get_traced_memory()[0])

        with _Made() as made:
            call(
                function, measured(made), expected="a number"
            )  # what is loaded at the first use is not held for the batches
        running = tracemalloc.is_tracing()
        if not running:
            tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            with _Made() as made:
                call(function, measured(made))
        finally:
            if not running:
                tracemalloc.stop()
        if held[-1] - before > x.nbytes / 6:  # a batch and some objects are a tenth
            raise CheckFailed(
                f"{function.__name__} is right, but at the end it holds as much as if batches were kept: {_LET_GO}"
            )
        return "It keeps no batches."

    mistakes = {
        "n counts batches: it is the number of tokens": _counted_in_batches,
        "the mean of the batches' explained variances: take the ratio of two sums over all tokens": partial(
            _batchwise, weigh=False
        ),
        "the weighted mean of the batches' explained variances: take the ratio of two sums over all tokens": partial(
            _batchwise, weigh=True
        ),
        "only the last batch counts: add the sums up": lambda x, y, n: _explained_otherwise(
            x.split(n)[-1], y.split(n)[-1], n
        ),
        "each batch is centred on its own mean: the mean is over all tokens": _own_means,
        "the mean of the batches' means: the last batch is shorter and has to count less": _mean_of_means,
        "activations are not centred: the reference is an auto-encoder that returns the mean, not 0": partial(
            _explained_otherwise, centre=lambda x: 0
        ),
        "one mean over all neurons: each has its own, so take it over tokens only": partial(
            _explained_otherwise, centre=lambda x: x.mean()
        ),
        "each token is centred on the mean of its neurons: take the mean over tokens": partial(
            _explained_otherwise, centre=lambda x: x.mean(1, keepdims=True)
        ),
        "the mean of the neurons' explained variances: a neuron that varies little counts for little": partial(
            _explained_otherwise, then=lambda error, spread: 1 - (error.sum(0) / spread.sum(0)).mean()
        ),
        "the errors are centred: an auto-encoder that is off by a constant is wrong": partial(
            _explained_otherwise, bias=False
        ),
        "this is the share that is not explained: subtract it from 1": partial(
            _explained_otherwise, then=lambda error, spread: error.sum() / spread.sum()
        ),
    }
    grade(on_stream, ACTIVITY, _explained, "numpy on all tokens at once", mistakes, rules=[no_room])


_LET_GO = "there is no room for them; add up sums and let them go"


class _Made(TorchDispatchMode):
    """Knows the tensors that torch made, as long as they live."""

    def __init__(self):
        super().__init__()
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        out = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out

    def alive(self) -> int:
        """Bytes in their storages."""
        tensors = [x for reference in self.made if (x := reference()) is not None]
        self.made = [weakref.ref(x) for x in tensors]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values())


def _explained(x: Tensor, x_hat: Tensor, batch: list[int]) -> float:
    x, x_hat = x.numpy(), x_hat.numpy()
    return 1 - ((x - x_hat) ** 2).mean(0).sum() / x.var(0).sum()


def _explained_otherwise(
    x: Tensor,
    x_hat: Tensor,
    batch: list[int],
    centre: Callable = lambda x: x.mean(0),
    then: Callable = lambda error, spread: 1 - error.sum() / spread.sum(),
    bias: bool = True,
) -> float:
    x, error = x.numpy(), (x - x_hat).numpy()
    if not bias:
        error = error - error.mean(0)
    return then(error**2, (x - centre(x)) ** 2)


def _batchwise(x: Tensor, x_hat: Tensor, batch: list[int], weigh: bool, **how: object) -> float:
    pairs = list(zip(x.split(batch), x_hat.split(batch), strict=True))
    values = [_explained_otherwise(*pair, batch, **how) for pair in pairs]
    return np.average(values, weights=[len(a) if weigh else 1 for a, _ in pairs])


def _own_means(x: Tensor, x_hat: Tensor, batch: list[int]) -> float:
    spread = sum(((a - a.mean(0)) ** 2).sum() for a in x.split(batch))
    return 1 - ((x - x_hat) ** 2).sum() / spread


def _mean_of_means(x: Tensor, x_hat: Tensor, batch: list[int]) -> float:
    centre = np.mean([a.mean(0).numpy() for a in x.split(batch)], 0)
    return _explained_otherwise(x, x_hat, batch, centre=lambda x: centre)


def _counted_in_batches(x: Tensor, x_hat: Tensor, batch: list[int]) -> float:
    n_batches, x, x_hat = len(x.split(batch)), x.numpy(), x_hat.numpy()
    return 1 - ((x - x_hat) ** 2).sum() / ((x**2).sum() - (x.sum(0) ** 2).sum() / n_batches)


def gradient_of_rows(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 10.D: the gradient of a direction, against small steps of every entry."""

    def small_steps(G: Tensor, V: Tensor) -> np.ndarray:
        """Central differences of a loss whose gradient with respect to the directions is G: their product's sum."""
        G, V, step = G.numpy(), V.numpy(), 1e-5

        def loss(V: np.ndarray) -> float:
            return float((G * V / np.sqrt((V**2).sum(1))[:, None]).sum())

        out = np.zeros(V.shape)
        for place in np.ndindex(V.shape):
            moved = np.zeros(V.shape)
            moved[place] = step
            out[place] = (loss(V + moved) - loss(V - moved)) / (2 * step)
        return out

    def variant(
        G: Tensor,
        V: Tensor,
        axis: int | None = 1,
        sign: float = -1,
        lever: float = -1,
        unit: bool = True,
        across: bool = True,
    ) -> np.ndarray:
        G, V = G.numpy(), V.numpy()
        length = np.sqrt((V**2).sum(1, keepdims=True))
        if axis != 1:
            length = np.sqrt((V**2).sum(axis, keepdims=True))
        W = V / length if unit else V
        along = (G * W).sum(axis, keepdims=True) * W
        return ((G if across else 0) + sign * along) * length**lever

    def all_rows(G: Tensor, V: Tensor) -> np.ndarray:
        G, V = G.numpy(), V.numpy()
        length = np.sqrt((V**2).sum(1, keepdims=True))
        return (G - G @ (V / length).T @ (V / length)) / length

    mistakes = {
        "a row loses its parts along all rows: only the part along itself has to go": all_rows,
        "the lever is missing: the same step turns a long row less, so divide by the length": partial(variant, lever=0),
        "multiplied by the length: the same step turns a long row less, so divide": partial(variant, lever=1),
        "divided by the square of the length: w has unit length already": partial(variant, lever=-2),
        "the part along the row is still there: a longer row has the same direction": partial(variant, sign=0),
        "the gradient with respect to W comes back as it is": partial(variant, sign=0, lever=0),
        "the part along the row is added instead of being taken out": partial(variant, sign=1),
        "this is the part along the row: the rest is wanted": partial(variant, sign=1, across=False),
        "the part along V is computed with rows that are not of unit length": partial(variant, unit=False),
        "the part along V is computed with rows that are not of unit length, and the lever is missing": partial(
            variant, unit=False, lever=0
        ),
        "columns are treated as atoms: they are the rows of W_dec, so sum over dim=1": partial(variant, axis=0),
        "the matrix is treated as one long vector: every row has a part of its own": partial(variant, axis=None),
    }
    rules = [watching.no_automatic_differentiation(ROWS[0])]
    grade(function, ROWS, small_steps, "small steps of every entry", mistakes, rtol=1e-6, atol=1e-7, rules=rules)


def measurement(function: Callable[[Sae, Tensor, Tensor], float]) -> None:
    """Exercise 10.E, first part: a number that tells runs that have learned by heart from honest ones.

    Of two seeds each: one that has learned `seen` by heart, and an honest one, whole and after half of its steps, given
    the same activations.
    """
    name = function.__name__

    def measured(sae: Sae, seen: Tensor, fresh: Tensor) -> float:
        value = number(call(function, sae, seen, fresh, expected="a number"), name, true=1)
        if not np.isfinite(value):
            raise CheckFailed(f"{name} is {value} for a run; a finite number is needed")
        if number(call(function, sae, seen, fresh), name, true=1) != value:
            raise CheckFailed(f"{name} gives another number when it is asked again: draw nothing at random")
        return value

    heart, whole, half = [], [], []
    for seed in (0, 1):
        few, honest = train("few", seed), train("none", seed)
        for values, sae in (heart, few.sae), (whole, honest.sae), (half, honest.halfway):
            values.append(measured(sae, few.seen, few.fresh))
    shown = "; ".join(
        f"{what} {values[0]:z.3g} and {values[1]:z.3g}"
        for what, values in {"by heart": heart, "honest": whole, "honest, half-way": half}.items()
    )
    if np.allclose(heart, whole, rtol=1e-6, atol=1e-9):
        raise CheckFailed(
            f"{name} gives the same whatever the auto-encoder has learned ({shown}): let it reconstruct the activations"
        )
    if not _apart(heart, whole):
        raise CheckFailed(
            f"{name} does not tell runs that have learned by heart from honest ones ({shown}): on which of the two "
            "texts would they differ?"
        )
    if not _apart(heart, whole + half):
        raise CheckFailed(
            f"{name} tells them apart at the end, but takes an honest run half-way for another ({shown}): how good a "
            "run is says nothing; compare the two texts, token for token, for they are not equally long"
        )
    print(f"{name}: tells them apart, in two runs of each kind that you have not seen ({shown}). Your seven runs:")
    for letter, run in broken_runs().items():
        print(f"{letter}: {measured(run.sae, run.seen, run.fresh):z.3g}")


def _apart(by_heart: list[float], honest: list[float]) -> bool:
    """Whether those lie farther from these than three times what these are wide."""
    gap = max(min(by_heart) - max(honest), min(honest) - max(by_heart))
    return gap > 3 * np.ptp(honest)


_WHY = {
    "none": "all rows have length 1, the splice costs less and less but not nothing, and both texts are alike to it",
    "rate": "its loss begins where the others' do, so λ is theirs. Then it goes up and down, nearly all features are "
    "dead within thirty steps, and next to nothing is explained",
    "price": "its loss begins at more than ten times the others', before anything is learned: that is λ Σ f. Then "
    "nothing is active, and the loss is that of saying nothing, a little above 1",
    "lengths": "the curves are those of a good run, but the rows of W_dec have grown to about 1.5, and evade the price",
    "hook": "an auto-encoder that leaves a fifth of the variance out and costs no nats at all is not in the model",
    "order": "the loss jumps up whenever the domain changes, and falls until the next",
    "few": "the best curves of all, measured on the tokens that it was trained on; on a fresh text it explains less "
    "than the sound one",
}


def diagnosis(function: Callable[[], dict[str, str]], reasons: bool = False) -> None:
    """Exercise 10.E, second part: which run has which fault."""
    said = predict(function, keys=FAULT_OF, words=tuple(_WHY))
    if twice := {fault for fault in said.values() if list(said.values()).count(fault) > 1}:
        raise CheckFailed(f"{function.__name__}: each fault has one run; {min(twice)} stands twice")
    right = {letter: f'"{fault}": {_WHY[fault]}' for letter, fault in FAULT_OF.items()}
    wrong = {letter: None if said[letter] == fault else f" is {right[letter]}" for letter, fault in FAULT_OF.items()}
    judge(function, wrong, reasons, right)
