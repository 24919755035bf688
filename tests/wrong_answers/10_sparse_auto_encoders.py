"""Wrong answers to the exercises of chapter 10: what a check says -> a function with that mistake."""

import torch
import torch.nn.functional as F
from wrong_answers.asked import at_first, in_place_of, on_request


def switch(read=lambda x, b: x - b, code=lambda a, b: F.relu(a + b), off=None, write=lambda y, b: y + b):
    """The reconstruction without a feature, with another step in one place."""

    def silence(f, j):
        return f.index_fill(1, torch.tensor([j]), 0.0)

    def function(x, W_enc, b_enc, W_dec, b_dec, j):
        f = code(read(x, b_dec) @ W_enc, b_enc)
        return write((off or silence)(f, j) @ W_dec, b_dec)

    return function


def switched_off_early(x, W_enc, b_enc, W_dec, b_dec, j):
    a = (x - b_dec) @ W_enc
    a[:, j] = 0
    return F.relu(a + b_enc) @ W_dec + b_dec


def tied(x, W_enc, b_enc, W_dec, b_dec, j):
    return switch()(x, W_dec.mT, b_enc, W_dec, b_dec, j)


def silence_a_token(f, j):
    f = f.clone()
    f[j] = 0
    return f


def by_topk(p, k):
    f = F.relu(p)
    values, places = f.flatten().topk(min(k * len(f), f.numel()))
    return torch.zeros(f.numel(), dtype=f.dtype).scatter(0, places, values).reshape(f.shape)


def topk_along(dim):
    def function(p, k):
        f = F.relu(p)
        values, places = f.topk(min(k, f.shape[dim]), dim)
        return torch.zeros_like(f).scatter(dim, places, values)

    return function


def exceeds(index, compare=torch.gt, then=lambda f, kept, tau: f * kept, relu=F.relu):
    """Keep what exceeds one entry of the sorted batch."""

    def function(p, k):
        f = relu(p)
        values, at = f.flatten().sort(descending=True).values, index(k, *f.shape)
        if at >= len(values):
            tau = values[-1] - 1 if relu is not F.relu else torch.tensor(0.0)
            return then(f, f > tau, tau)
        return then(f, compare(f, values[at]), values[at])

    return function


def by_size(p, k):
    size = p.abs().flatten().sort(descending=True).values
    return torch.where(p.abs() > size[k * len(p)], p, 0.0) if k * len(p) < p.numel() else p


def mean_of_values(weigh=False):
    def function(batches):
        total, weights = 0.0, 0
        for x, x_hat in batches:
            weight = len(x) if weigh else 1
            total += weight * (1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
            weights += weight
        return total / weights

    return function


def sums(spread):
    """Batch by batch, with another denominator."""

    def function(batches):
        e, s = 0.0, 0.0
        for x, y in batches:
            e, s = e + (x - y).square().sum(), s + spread(x)
        return 1 - e / s

    return function


def streamed(of=lambda e, s, n, bias: 1 - e.sum() / s.sum(), one_mean=False, mean_of_means=False):
    def function(batches):
        n, pieces, error, total, squares, means, bias = 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
        for x, y in batches:
            n, pieces, error, bias = n + len(x), pieces + 1, error + (x - y).square().sum(0), bias + (x - y).sum(0)
            total, squares, means = total + x.sum(0), squares + x.square().sum(0), means + x.mean(0)
        mean = means / pieces if mean_of_means else total / n
        mean = mean.mean() if one_mean else mean
        return of(error, squares - 2 * mean * total + n * mean**2, n, bias)

    return function


def counts_batches(batches):
    n, error, total, squares = 0, 0.0, 0.0, 0.0
    for x, y in batches:
        n, error = n + 1, error + (x - y).square().sum()
        total, squares = total + x.sum(0), squares + x.square().sum()
    return 1 - error / (squares - total.square().sum() / n)


def last_only(batches):
    for x, y in batches:
        value = 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()
    return value


def gathered(batches):
    x, y = (torch.cat(half) for half in zip(*batches, strict=True))
    return 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()


def remembered(keep):
    def function(batches):
        xs, ys = [], []
        for x, y in batches:
            xs.append(keep(x))
            ys.append(keep(y))
        x, y = (torch.cat([torch.as_tensor(part) for part in parts]) for parts in (xs, ys))
        return gathered([(x, y)])

    return function


def joined(batches):
    """Keeps one half alone, in one tensor that grows."""
    every, error = torch.zeros(0), 0.0
    for x, y in batches:
        every = torch.cat([every.reshape(-1, x.shape[1]), x])
        error += (x - y).square().sum()
    return 1 - error / (every - every.mean(0)).square().sum()


def into_a_buffer(batches):
    """Makes room for all of them beforehand."""
    every, n, error = torch.zeros(1_000_000), 0, 0.0
    for x, y in batches:
        every[n : n + x.numel()] = x.flatten()
        n, error, h = n + x.numel(), error + (x - y).square().sum(), x.shape[1]
    every = every[:n].view(-1, h)
    return 1 - error / (every - every.mean(0)).square().sum()


def centred_in_place(batches):
    total, n, error, squares = 0.0, 0, 0.0, 0.0
    for x, y in batches:
        error, total, n = error + (x - y).square().sum(), total + x.sum(0), n + len(x)
        squares += x.square_().sum()
    return 1 - error / (squares - total.square().sum() / n)


def rows(dim=1, unit=True, keep=lambda G, along: G - along, lever=lambda y, length: y / length):
    def function(G, V):
        length = V.norm(dim=dim, keepdim=True)
        W = V / length if unit else V
        return lever(keep(G, (G * W).sum(dim, keepdim=True) * W), length)

    return function


def along_all_rows(G, V):
    W = F.normalize(V, dim=1)
    return (G - G @ W.mT @ W) / V.norm(dim=1, keepdim=True)


def one_vector(G, V):
    W = V / V.norm()
    return (G - (G * W).sum() * W) / V.norm()


def by_grad(G, V):
    V = V.clone().requires_grad_()
    return torch.autograd.grad((G * F.normalize(V, dim=1)).sum(), V)[0]


def by_backward(G, V):
    V = V.clone().requires_grad_()
    (G * V / V.norm(dim=1, keepdim=True)).sum().backward()
    return V.grad


def explained(sae, x):
    return float(1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())


def half_set_to_zero(sae, seen, fresh):
    sae.W_dec.data[::2] = 0
    return explained(sae, seen) - explained(sae, fresh)


FAULTS = dict(zip("ABCDEFG", ["order", "few", "price", "none", "lengths", "hook", "rate"], strict=True))
MEASURED = {
    "takes an honest run half-way for another": lambda sae, seen, fresh: explained(sae, fresh),
    "half-way for another .*compare the two texts": lambda sae, seen, fresh: float(
        (sae(fresh) - fresh).square().mean()
    ),
    "gives the same whatever the auto-encoder has learned": lambda sae, seen, fresh: sae.W_dec.norm(dim=1).mean(),
    "gives the same whatever .* let it reconstruct": lambda sae, seen, fresh: seen.std() - fresh.std(),
    "does not tell runs that have learned by heart from honest ones": lambda sae, seen, fresh: float(
        10 * seen.mean() + 0.01 * explained(sae, fresh)
    ),
    "measurement: a number is needed": lambda sae, seen, fresh: (sae(seen) - seen).square().sum(1),
    "measurement is nan for a run": lambda sae, seen, fresh: torch.nan,
    "draw nothing at random": lambda sae, seen, fresh: float(torch.rand(())),
    "measurement leaves the model changed": half_set_to_zero,
}


WRONG = {
    "10.A": {
        "b_dec is not subtracted from x": switch(read=lambda x, b: x),
        "b_dec is added to x": switch(read=lambda x, b: x + b),
        "b_dec is missing from the reconstruction": switch(write=lambda y, b: y),
        "neither subtracted nor added": switch(read=lambda x, b: x, write=lambda y, b: y),
        "b_dec is subtracted from the reconstruction": switch(write=lambda y, b: y - b),
        "b_enc is missing": switch(code=lambda a, b: F.relu(a)),
        "the ReLU is missing": switch(code=torch.add),
        "the ReLU comes before b_enc": switch(code=lambda a, b: F.relu(a) + b),
        "applied to the reconstruction instead": switch(code=torch.add, write=lambda y, b: F.relu(y + b)),
        "rectified too": switch(write=lambda y, b: F.relu(y + b)),
        "which switches it on again": switched_off_early,
        "No common mistake": lambda x, W_enc, b_enc, W_dec, b_dec, j: switch(off=None if j else lambda f, j: f)(
            x, W_enc, b_enc, W_dec, b_dec, j
        ),
        "in place": lambda x, W_enc, b_enc, W_dec, b_dec, j: switch(off=lambda f, j: f)(
            x, W_enc, b_enc, W_dec.index_fill_(0, torch.tensor([j]), 0), b_dec, j
        ),
        "all features are active": switch(off=lambda f, j: f),
        "only feature j is active": switch(off=lambda f, j: F.one_hot(torch.tensor(j), f.shape[1]) * f),
        "a token is silenced": switch(off=silence_a_token),
        "W_dec transposed encodes": tied,
        "start from the reconstruction": lambda x, W_enc, b_enc, W_dec, b_dec, j: (
            x - torch.outer(F.relu((x - b_dec) @ W_enc + b_enc)[:, j], W_dec[j])
        ),
    },
    "10.B": {
        "that is TopK": topk_along(1),
        "of each feature": topk_along(0),
        "k entries of the whole batch": exceeds(lambda k, n, m: k),
        "k·m entries": exceeds(lambda k, n, m: k * m),
        "one entry too few": exceeds(lambda k, n, m: k * n - 1),
        "one entry too many": exceeds(lambda k, n, m: k * n + 1),
        "negative entries are kept": exceeds(lambda k, n, m: k * n, relu=lambda p: p),
        "by absolute value": by_size,
        "that is shrinkage": exceeds(lambda k, n, m: k * n, then=lambda f, kept, tau: (f - tau) * kept),
        "says which entries": exceeds(lambda k, n, m: k * n, then=lambda f, kept, tau: kept.double()),
        "keep the large entries": exceeds(lambda k, n, m: k * n, then=lambda f, kept, tau: f * ~kept),
        "all are kept, more than the budget": exceeds(lambda k, n, m: k * n - 1, torch.ge),
        "up to the sorting": by_topk,
        "it gives 0 where": lambda p, k: exceeds(lambda k, n, m: min(k * n, n * m - 1))(p, k),
    },
    "10.C": {
        "^explained_variance: the mean of the batches' explained": mean_of_values(),
        "the weighted mean": mean_of_values(weigh=True),
        "only the last batch": last_only,
        "centred on its own mean": sums(lambda x: (x - x.mean(0)).square().sum()),
        "the mean of the batches' means": streamed(mean_of_means=True),
        "not centred": sums(lambda x: x.square().sum()),
        "one mean over all neurons": streamed(one_mean=True),
        "mean of its neurons": sums(lambda x: (x - x.mean(1, keepdim=True)).square().sum()),
        "mean of the neurons'": streamed(lambda e, s, n, bias: 1 - (e / s).mean()),
        "the errors are centred": streamed(lambda e, s, n, bias: 1 - (e - bias**2 / n).sum() / s.sum()),
        "not explained": streamed(lambda e, s, n, bias: e.sum() / s.sum()),
        "n counts batches": counts_batches,
        "batches are kept": gathered,
        "a batch in place": centred_in_place,
        "at the end it holds as much as": remembered(torch.clone),
        "holds as much as if batches were kept": remembered(lambda x: x.numpy().copy()),
        "as if batches were kept: there": remembered(torch.Tensor.tolist),
        "is right, but at the end it holds as much": joined,
        "is right, but at the end it holds": into_a_buffer,
    },
    "10.D": {
        "the lever is missing: the same": rows(lever=lambda y, length: y),
        "multiplied by the length": rows(lever=lambda y, length: y * length),
        "square of the length": rows(lever=lambda y, length: y / length**2),
        "still there": rows(keep=lambda G, along: G),
        "as it is": lambda G, V: G,
        "is added instead": rows(keep=torch.add),
        "the rest is wanted": rows(keep=lambda G, along: along),
        "not of unit length$": rows(unit=False),
        "unit length, and the lever": rows(unit=False, lever=lambda y, length: y),
        "columns are treated": rows(dim=0),
        "one long vector": one_vector,
        "along all rows": along_all_rows,
        "is right, but uses automatic differentiation": by_grad,
        "uses automatic differentiation: derive": lambda G, V: torch.func.vjp(lambda V: F.normalize(V, dim=1), V)[1](G)[
            0
        ],
        "automatic differentiation: derive it": by_backward,
    },
    "10.E": {message: in_place_of("measurement", answer) for message, answer in MEASURED.items()}
    | {
        "4 of 7 right.* `reasons=True`": at_first(lambda: FAULTS | {"B": "none", "D": "lengths", "E": "few"}),
        "(?s)5 of 7 right.*C is .price.*that is λ Σ f.*G is .rate": on_request(
            lambda: FAULTS | {"C": "rate", "G": "price"}
        ),
        "each fault has one run; none stands twice": lambda: FAULTS | {"E": "none"},
        "F is a str, 'splice'": lambda: FAULTS | {"F": "splice"},
        "G is missing": lambda: {key: FAULTS[key] for key in "ABCDEF"},
        "does it end in `return`": lambda: None,
    },
}
