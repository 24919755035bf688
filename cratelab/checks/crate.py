"""Checks of the exercises of chapter 5: parameters, invariances, a block, an edited neuron, the way to the logits."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cratelab as cl
from cratelab.checks.grading import CheckFailed, also, answering, grade, predict, random, same, state, unmended
from cratelab.checks.hunting import hunt, judge
from cratelab.checks.watching import differentiable, exact, no_automatic_differentiation, no_library, no_loop
from cratelab.crate import CrateBlock

SIZES = [(16, 64, 2, 50, 12), (12, 24, 3, 31, 7), (8, 40, 1, 19, 30)]


def parameters(function: Callable[[int, int, int, int, int], dict[str, int]], reasons: bool = False) -> None:
    """Exercise 5.A: parameters from (d, h, L, v, n), against the tensors of modules on the meta device."""
    tied = "the head is the token embedding: its v·d are counted once"
    positions = "there is also a learned vector for each of the n positions"
    last = "there is one more LayerNorm, before the head"
    mistakes = {
        "CRATE": {
            tied: lambda d, h, L, v, n: v * d,
            positions: lambda d, h, L, v, n: -n * d,
            "the dictionary encodes and decodes, and is one matrix": lambda d, h, L, v, n: L * h * d,
            "query, key and value are one matrix": lambda d, h, L, v, n: 2 * L * d * d,
            "MSSA has an output matrix beside U": lambda d, h, L, v, n: -L * d * d,
            "MSSA's output matrix has a bias, the only one of a matrix in CRATE": lambda d, h, L, v, n: -L * d,
            "each LayerNorm of CRATE has a weight and a bias": lambda d, h, L, v, n: -(2 * L + 1) * d,
            last: lambda d, h, L, v, n: -2 * d,
            "the LayerNorms have parameters too": lambda d, h, L, v, n: -(4 * L + 2) * d,
        },
        "GPT-2": {
            tied: lambda d, h, L, v, n: v * d,
            positions: lambda d, h, L, v, n: -n * d,
            "query, key and value are three matrices": lambda d, h, L, v, n: -2 * L * d * d,
            "an MLP has two matrices, one in and one out": lambda d, h, L, v, n: -L * h * d,
            "the GPT-2 of the comparison has no biases, and its LayerNorms have a weight only": (
                lambda d, h, L, v, n: (2 * L + 1) * d
            ),
            last: lambda d, h, L, v, n: -d,
            "the LayerNorms have weights": lambda d, h, L, v, n: -(2 * L + 1) * d,
        },
        "OpenAI": {
            tied: lambda d, h, L, v, n: v * d,
            positions: lambda d, h, L, v, n: -n * d,
            "all its matrices have biases: of 3d, d, h and d entries a layer": lambda d, h, L, v, n: -L * (5 * d + h),
            "the bias of query, key and value has 3d entries": lambda d, h, L, v, n: -2 * L * d,
            "the bias of the first MLP matrix has h entries": lambda d, h, L, v, n: L * (d - h),
            "its LayerNorms have biases too": lambda d, h, L, v, n: -(2 * L + 1) * d,
            last: lambda d, h, L, v, n: -2 * d,
        },
    }
    answers, counted = [], []
    for d, h, L, v, n in SIZES:
        size = dict(n_layers=L, n_heads=2, width=d, vocab_size=v, context=n, expansion=h // d)
        with torch.device("meta"):
            models = {
                "CRATE": cl.Crate(cl.CrateConfig(**size)),
                "GPT-2": cl.Gpt2(cl.Gpt2Config(**size)),
                "OpenAI": cl.Gpt2(cl.Gpt2Config(**size, bias=True)),
            }
        counted.append({key: sum(tensor.numel() for tensor in model.parameters()) for key, model in models.items()})
        answers.append(predict(function, d, h, L, v, n, keys=models, numbers=True))
    wrong: dict[str, str | None] = dict.fromkeys(counted[0])
    for key in wrong:
        excess = [answer[key] - right[key] for answer, right in zip(answers, counted, strict=True)]
        if any(excess):
            first = next(i for i, by in enumerate(excess) if by)
            d, h, L, v, n = SIZES[first]
            named = (text for text, by in mistakes[key].items() if excess == [by(*size) for size in SIZES])
            reason = next(named, "list the tensors by model.named_parameters(), and find the one you have forgotten")
            wrong[key] = (
                f": for d={d}, h={h}, L={L}, v={v}, n={n} you say {answers[first][key]:,}, the module has "
                f"{counted[first][key]:,}; {reason}"
            )
    judge(function, wrong, reasons)
    no_library(SIZES[0], why="count on paper; the check looks at modules")(function)
    print(f"{function.__name__}: right. Three modules of three sizes each have the parameters that you say.")


def change_of_block(function: Callable[[], dict[str, str]], reasons: bool = False) -> None:
    """Exercise 5.B: "same" or "changed" for what a CRATE block hands on, against a block with random weights."""
    block, z = _random_model(seed=1, n_layers=1, n_heads=2, width=8).blocks[0], random(1, 6, 8, seed=2)
    before = _output(block, z)

    def with_weights(change: Callable[[nn.Module], object]) -> Tensor:
        changed = copy.deepcopy(block)
        with torch.no_grad():
            change(changed)
        return _output(changed, z) - before

    turn = torch.block_diag(*torch.linalg.qr(random(2, 4, 4, seed=3)).Q)
    order = torch.tensor([3, 0, 4, 1, 2, 5])
    forgetful = block.attention_norm
    measured = {
        "permuted": (
            with_weights(lambda b: _set(b.ista.D, b.ista.D.flip(1))),
            "codes are permuted along, and DA is a sum over atoms: no order",
        ),
        "flipped": (
            with_weights(lambda b: b.ista.D[:, :16].mul_(-1)),
            "codes are not negative: an atom and its opposite do not fire on the same tokens",
        ),
        "turned": (
            with_weights(
                lambda b: (
                    _set(b.attention.projection.weight, turn.T @ b.attention.projection.weight),
                    _set(b.attention.output.weight, b.attention.output.weight @ turn),
                )
            ),
            "(U_kQ)ᵀz and (U_kQ)ᵀz' have the inner product of U_kᵀz and U_kᵀz', and the output matrix undoes the turn",
        ),
        "louder": (
            with_weights(lambda b: (b.attention.projection.weight.mul_(2), b.attention.output.weight.div_(2))),
            "the values are as before, but scores are products of two projections: they get four times as large",
        ),
        "shuffled": (
            _output(block, z[:, order])[:, -1] - before[:, -1],
            "a block knows no positions, and the last token sees all others: attention is a sum over them",
        ),
        "moved": (
            _output(block, z + 3) - before,
            "each LayerNorm takes the mean off, and no path leads around both",
        ),
        "longer": (
            _output(block, 3 * z) - before,
            "LN(3Z) = LN(Z), so MSSA adds what it added before, but to tokens three times as long",
        ),
        "forgetful": (
            block.ista(block.ista_norm(block.attention(forgetful(3 * z))))
            - block.ista(block.ista_norm(block.attention(forgetful(z)))),
            "without the residual everything comes through LN(Z), which forgets the length of tokens",
        ),
    }
    answer = predict(function, keys=measured, words=("same", "changed"))
    wrong = dict.fromkeys(measured)
    for key, (difference, reason) in measured.items():
        size = float(difference.detach().abs().max() / before.abs().max())
        right = "same" if size < 1e-3 else "changed"
        if answer[key] != right:
            wrong[key] = f": you say {answer[key]}; the output differs by {size:.0%} of its size: {reason}"
    judge(function, wrong, reasons, {key: reason for key, (_, reason) in measured.items()})
    no_library((), why="predict on paper; the check measures")(function)
    print(f"{function.__name__}: right. All eight were measured on a block with random weights.")


BUGS = {
    "the normalised tokens are carried on, where the residual path takes the tokens themselves": {"carry": "norm"},
    "both halves use attention_norm: ISTA has a LayerNorm of its own": {"second_norm": "attention_norm"},
    "MSSA's output bias is lost": {"bias": False},
}


def exposing(inputs: Callable[[], list[tuple]], tell: bool = True) -> None:
    """Exercise 5.C: (block, z) that expose the bugs of a block, to the accuracy of the author's test."""
    hunt(inputs, _by_hand, BUGS, {"block": _in_double, "z": "b n d"}, _no_input, tell, seen=1e-4)


def _in_double(block: object) -> nn.Module | None:
    if not isinstance(block, CrateBlock):
        return None
    return copy.deepcopy(block).cpu().double().requires_grad_(False)


def _no_input(block: nn.Module, z: Tensor) -> str | None:
    width = block.ista.D.shape[0]
    if z.shape[2] != width:
        return f"the tokens have {z.shape[2]} coordinates, and the block takes {width}"
    if z.shape[1] > 32:
        return f"texts of {z.shape[1]} tokens; 32 are enough"
    if not torch.allclose(_output(block, z), _by_hand(block, z)):
        return "the block is not as in the chapter: change the numbers in it, and leave its settings"
    return None


def mended_forward(function: Callable[[SimpleNamespace, Tensor], Tensor], inputs: Callable[[], list[tuple]]) -> None:
    """Exercise 5.C: the output of a block's parts, against an evaluation token by token, after the hunt."""
    exposing(inputs, tell=False)
    cases = []
    for seed, (b, width, n_heads, n) in enumerate([(1, 8, 2, 5), (3, 6, 3, 7), (2, 8, 4, 3)], start=4):
        parts = _random_model(seed, n_layers=1, n_heads=n_heads, width=width).blocks[0]
        names = "attention_norm", "attention", "ista_norm", "ista"
        block = _Parts(**{name: getattr(parts, name) for name in names}, neurons=_Damped())
        cases.append((block, 2 * random(b, n, width, seed=seed + 10) + 0.5))
    others = {
        "the tokens are added to DA: there is no residual around ISTA": {"around_ista": True},
        "nothing is carried around MSSA: Z + MSSA(LN(Z))": {"carry": "nothing"},
        "MSSA takes the tokens as they are: attention_norm comes first": {"first_norm": False},
        "the LayerNorms stand behind the sums, not before the halves": {"behind": True},
        "the codes do not pass through block.neurons, so that no hook sees them": {"neurons": False},
        "what is decoded has not gone through the last threshold": {"threshold": False},
    }
    mistakes = unmended(_by_hand, BUGS) | {text: partial(_by_hand, **options) for text, options in others.items()}
    mistakes["texts are mixed: each of a batch is on its own"] = lambda block, z: (
        _by_hand(block, z).mean(0, keepdim=True).expand(z.shape)
    )
    edges = [(cases[0][0], cases[0][1][:, :1]), (cases[1][0], 0 * cases[1][1]), (cases[2][0], 20 * cases[2][1])]
    rules = [
        also("a text may have one token, and tokens may be zero or long", *edges, oracle=_by_hand),
        differentiable(_by_hand, cases[1], {1: "z"}, "a block is there to be trained"),
    ]
    grade(function, cases, _by_hand, "an evaluation token by token", mistakes, rules=rules)


def with_neuron(function: Callable[[nn.Module, Tensor, int, int, float], Tensor]) -> None:
    """Exercise 5.D: logits with a neuron's code set, against a layer's output moved along the atom."""

    def put(code, where, value):
        edited = code.clone()
        edited[where] = value
        return edited

    def set_everywhere(code, neuron, value):
        return put(code, (..., neuron), value)

    def moved(model, tokens, layer, neuron, value, edit=set_everywhere):
        x = model.token_embedding(tokens) + model.position_embedding.weight[: tokens.shape[1]]
        for i, block in enumerate(model.blocks):
            code = _proximal(block.ista_norm(x + block.attention(block.attention_norm(x))), block.ista)
            x = block(x)
            if layer in (i, "every"):
                x = x + (edit(code, neuron, value) - code) @ block.ista.D.mT
        return F.linear(model.norm(x), model.token_embedding.weight)

    def mistaken(edit):
        return lambda model, tokens, layer, neuron, value: moved(model, tokens, layer, neuron, value, edit)

    model = _random_model(seed=7, n_layers=3, n_heads=2, width=8)
    tokens = torch.randint(20, (2, 9), generator=torch.Generator("cpu").manual_seed(8), device="cpu")
    cases = [(model, tokens, 0, 4, 0.0), (model, tokens, 1, 5, 1.5), (model, tokens, 2, 7, 0.7)]  # the last never fires
    mistakes = {
        "nothing has changed: a hook that returns nothing, or a copy, leaves the codes as they are": (
            lambda m, t, layer, i, v: m(t)
        ),
        "the value is added to the code; it should take its place": mistaken(
            lambda code, i, value: put(code, (..., i), code[..., i] + value)
        ),
        "the code is multiplied by the value; it should be the value": mistaken(
            lambda code, i, value: put(code, (..., i), code[..., i] * value)
        ),
        "layers are counted from 0": lambda m, t, layer, i, value: moved(m, t, (layer - 1) % 3, i, value),
        "only the last token's code is set; all were asked for": mistaken(
            lambda code, i, value: put(code, (slice(None), -1, i), value)
        ),
        "all neurons of one token are set: codes are (b, n, h), and neurons are on the last axis": mistaken(
            lambda code, i, value: put(code, (slice(None), i), value)
        ),
        "all neurons are set": mistaken(lambda code, i, value: torch.full_like(code, value)),
        "the neuron is set in every layer": lambda m, t, layer, i, value: moved(m, t, "every", i, value),
        "the neuron is set only where it fires": mistaken(
            lambda code, i, value: put(code, (..., i), torch.where(code[..., i] > 0, value, 0.0))
        ),
    }
    edges = [(model, tokens[:1, :1], 2, 0, -0.5), (model, tokens, 0, 31, 40)]
    rules = [
        also("a text may have one token, and a value may be negative or large", *edges, oracle=moved),
        partial(_cleans_up, model=model, tokens=tokens),
    ]
    grade(function, cases, moved, "moving the layer's output along the atom", mistakes, rules=rules)


def _cleans_up(function: Callable, model: nn.Module, tokens: Tensor) -> None:
    """Exercise 5.D: nothing stays behind after an error, and the hooks of others stay."""
    own, seen = copy.deepcopy(model), []

    def interrupt(*_):
        raise KeyboardInterrupt

    own.norm.register_forward_hook(interrupt)  # somebody stops the notebook's cell, when the hook has done its work
    before = state(own)
    for name, asked in {"an error in the model": tokens + 1000, "a cell that is interrupted": tokens}.items():
        with suppress(Exception, KeyboardInterrupt):
            function(own, asked, 1, 5, 1.5)
        if not same(before, state(own)):
            raise CheckFailed(
                f"{function.__name__} is right, but {name} leaves the model changed: remove the hook in `finally`"
            )
    own = copy.deepcopy(model)
    own.blocks[1].neurons.register_forward_hook(lambda module, inputs, codes: seen.append(codes))
    before = state(own)
    with answering(function, "where somebody else has put a hook on the neurons", "logits"):
        function(own, tokens, 1, 5, 1.5)
    if not same(before, state(own)) or not seen:
        raise CheckFailed(
            f"{function.__name__} is right, but takes away a hook that somebody else has put there: remove yours only"
        )


def push(function: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 5.E: the derivative of logits along an atom, (n, v), against automatic differentiation."""

    def forward_mode(x: Tensor, atom: Tensor, weight: Tensor, E: Tensor, norm_eps: float) -> Tensor:
        logits = lambda x: F.layer_norm(x, x.shape[-1:], weight, eps=norm_eps) @ E.T  # noqa: E731
        return torch.autograd.functional.jvp(logits, x, atom.expand_as(x))[1]

    def variant(
        x, atom, weight, E, norm_eps, centre=True, still=False, plain=False, power=0.5, ddof=0, eps=True, d=None
    ):
        """The two terms of the quotient rule, with mistakes."""
        middle = x - x.mean(1, keepdim=True)
        variance = middle.square().sum(1, keepdim=True) / (x.shape[1] - ddof) + norm_eps * eps
        atom = atom - atom.mean() if centre else atom
        first = atom / variance**power
        along = middle * (middle @ atom)[:, None] / (d or x.shape[1])
        second = 0 * x if still else along / variance ** (power + 1)
        return ((first - second) * (1 if plain else weight)) @ E.T

    cases = [
        (random(5, 6, seed=1) + 0.7, random(6, seed=2), random(6, seed=3), random(9, 6, seed=4), 1e-5),
        (0.05 * random(3, 8, seed=5), random(8, seed=6) - 0.5, random(8, seed=7), random(4, 8, seed=8), 1e-2),
        (2 * random(4, 5, seed=9), random(5, seed=10) + 1, random(5, seed=11), random(7, 5, seed=12), 1e-5),
    ]
    mistakes = {
        "this is the atom's product with the embeddings: LayerNorm stands between": lambda x, atom, w, E, e: (
            E @ atom
        ).expand(len(x), -1),
        "the atom's mean is not taken off: LayerNorm lets nothing of (1, …, 1) through": (
            lambda *case: variant(*case, centre=False)
        ),
        "the standard deviation is taken as fixed: it changes too, by the atom's part along the token": (
            lambda *case: variant(*case, still=True)
        ),
        "mean and standard deviation are taken as fixed": lambda *case: variant(*case, centre=False, still=True),
        "the part along the token is taken off d times: u has the squared length d, not 1": (
            lambda *case: variant(*case, d=1)
        ),
        "LayerNorm's weight is lost": lambda *case: variant(*case, plain=True),
        "divided by the variance: LayerNorm divides by its root": lambda *case: variant(*case, power=1),
        "the variance of LayerNorm is a mean over d; torch.std and torch.var divide by d − 1": (
            lambda *case: variant(*case, ddof=1)
        ),
        "norm_eps is lost: LayerNorm divides by the root of variance + norm_eps": (
            lambda *case: variant(*case, eps=False)
        ),
    }
    edges = [
        (random(1, 6, seed=13), random(6, seed=14), random(6, seed=15), random(3, 6, seed=16), 1e-5),
        (
            torch.ones(2, 5, dtype=torch.float64, device="cpu"),
            random(5, seed=17),
            random(5, seed=18),
            cases[2][3],
            1e-2,
        ),
        (1e-3 * random(4, 5, seed=19), random(5, seed=20), random(5, seed=21), cases[2][3], 1e-5),
        (random(3, 6, seed=22), 0 * random(6, seed=23), random(6, seed=24), random(3, 6, seed=25), 1e-5),
        (1e-3 * random(4, 6, seed=27), random(6, seed=28), random(6, seed=29), random(3, 6, seed=30), 1e-8),
    ]
    few, many = ((random(n, 6, seed=26), *cases[0][1:]) for n in (4, 12))
    rules = [
        also("a token may be constant or tiny, an atom 0, norm_eps tiny", *edges, oracle=forward_mode),
        no_automatic_differentiation(few),
        no_loop(few, many, "tokens"),
        exact(forward_mode, *cases),
    ]
    grade(function, cases, forward_mode, "automatic differentiation", mistakes, rules=rules)


class _Parts(SimpleNamespace):
    """The parts of a block, which are not the block."""

    def __call__(self, *_: object) -> Tensor:
        raise TypeError("the block itself cannot be called here, only its parts: write what it does with them")


class _Damped(nn.Module):
    """A stand-in for a hook: three quarters of each code pass."""

    def forward(self, code: Tensor) -> Tensor:
        return 0.75 * code


def _random_model(seed: int, n_layers: int, n_heads: int, width: int) -> cl.Crate:
    """A CRATE in double precision none of whose parameters is as at the start of training."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = cl.Crate(cl.CrateConfig(n_layers, n_heads, width, vocab_size=20, context=12)).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.6 * random(*parameter.shape, seed=100 * seed + i) + (parameter.ndim == 1)
    return model.requires_grad_(False)


@torch.no_grad()
def _output(block: nn.Module, z: Tensor) -> Tensor:
    return block(z)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.clone())


def _proximal(z: Tensor, ista: nn.Module, threshold: bool = True) -> Tensor:
    """Codes by proximal gradient steps, the gradient of ½‖z − Da‖² by automatic differentiation."""
    D, size, lam = ista.D.detach(), ista.step_size, ista.lam
    code = torch.zeros(*z.shape[:-1], D.shape[1], dtype=z.dtype, device=z.device)
    for step in range(ista.n_steps):
        with torch.enable_grad():
            code = code.detach().requires_grad_()
            misfit = (z.detach() - code @ D.T).square().sum() / 2
            (gradient,) = torch.autograd.grad(misfit, code)
        code = code.detach() - size * gradient
        if threshold or step < ista.n_steps - 1:
            code = (code - size * lam).clamp(min=0)
    return code


@torch.no_grad()
def _by_hand(
    block: SimpleNamespace,
    z: Tensor,
    carry: str = "raw",
    first_norm: bool = True,
    second_norm: str = "ista_norm",
    bias: bool = True,
    around_ista: bool = False,
    behind: bool = False,
    threshold: bool = True,
    neurons: bool = True,
) -> Tensor:
    """A block one token and one head after the other; with the mistakes of Exercise 5.C where asked."""

    def norm(x: Tensor, name: str) -> Tensor:
        layer = getattr(block, name)
        middle = x - x.mean(-1, keepdim=True)
        return middle / (middle.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    if len(z) != 1:
        options = dict(carry=carry, first_norm=first_norm, second_norm=second_norm, bias=bias, around_ista=around_ista)
        options |= dict(behind=behind, threshold=threshold, neurons=neurons)
        return torch.cat([_by_hand(block, text[None], **options) for text in z])
    (tokens,) = z
    seen = norm(tokens, "attention_norm") if first_norm and not behind else tokens
    n, K = len(tokens), block.attention.n_heads
    written = torch.zeros_like(tokens)
    for i in range(n):
        heads = []
        for basis in block.attention.projection.weight.chunk(K):
            w = [basis @ seen[j] for j in range(i + 1)]
            scores = torch.stack([w[i] @ other for other in w]) / len(basis) ** 0.5
            heads.append(sum(share * other for share, other in zip(scores.softmax(0), w, strict=True)))
        written[i] = block.attention.output.weight @ torch.cat(heads)
    if bias:
        written = written + block.attention.output.bias
    half = written + {"raw": tokens, "norm": norm(tokens, "attention_norm"), "nothing": 0 * tokens}[carry]
    if behind:
        target = half = norm(half, "attention_norm")
    else:
        target = norm(half, second_norm)
    code = _proximal(target, block.ista, threshold)
    atoms = (block.neurons(code) if neurons else code) @ block.ista.D.T
    if behind:
        atoms = norm(atoms, "ista_norm")
    return (atoms + half if around_ista else atoms)[None]
