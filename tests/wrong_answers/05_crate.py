"""Wrong answers to the exercises of chapter 5: what a check says -> a function with that mistake."""

import torch
import torch.nn.functional as F
from torch import nn
from wrong_answers.asked import at_first, hunts, in_place_of, on_request

import cratelab as cl
from cratelab.experiments.reference_models import load_reference


def count(**wrong):
    """The right counts but for one model, to which wrong[model](d, h, L, v, n) is added."""

    def function(d, h, L, v, n):
        around = v * d + n * d
        right = {
            "CRATE": around + L * (2 * d * d + h * d + 5 * d) + 2 * d,
            "GPT-2": around + L * (4 * d * d + 2 * h * d + 2 * d) + d,
            "OpenAI": around + L * (4 * d * d + 2 * h * d + 9 * d + h) + 2 * d,
        }
        return {
            key: value + wrong.get(key.replace("-", ""), lambda *_: 0)(d, h, L, v, n) for key, value in right.items()
        }

    return on_request(function)


def say(**changed):
    """The right predictions but for one."""
    same = {"permuted", "turned", "shuffled", "moved", "forgetful"}
    keys = "permuted", "flipped", "turned", "louder", "shuffled", "moved", "longer", "forgetful"
    return on_request(lambda: {key: "same" if key in same else "changed" for key in keys} | changed)


def forward(
    carry=lambda b, z: z, second="ista_norm", bias=True, last=lambda b, y: b.neurons(b.ista.encode(y)), add=False
):
    """A block with the parts in other places."""

    def function(b, z):
        mssa = b.attention(b.attention_norm(z)) - (0 if bias else b.attention.output.bias)
        half = carry(b, z) + mssa
        out = b.ista.decode(last(b, getattr(b, second)(half)))
        return out + half if add else out

    return function


TOKENS = F.layer_norm(torch.arange(640.0, dtype=torch.float64).sin().reshape(2, 5, 64), (64,))


def block(change=lambda b: None, **config):
    block = cl.Crate(cl.CrateConfig.preset("toy", **config)).blocks[0].requires_grad_(False)
    change(block)
    return block


def exposing():
    other_norm, biased = block(lambda b: b.ista_norm.bias.normal_()), block(lambda b: b.attention.output.bias.normal_())
    return [(block(), 3 * TOKENS), (other_norm, TOKENS), (biased, TOKENS)]


INPUTS = {
    "0 of 3 bugs exposed.\ninput 1 shows no bug: all functions give the right answer$": lambda: [(block(), TOKENS)],
    "0 of 3 bugs exposed.\ninput 1 shows no bug": lambda: [(block(), TOKENS + 3)],
    "exposing: 0 of 3 bugs exposed.\ninput 1 shows no bug": lambda: [(block(), 1.002 * TOKENS)],
    "1 of 3 bugs exposed.\ninput 1: MSSA's output bias is lost\ninput 2 shows no bug": lambda: [
        (block(lambda b: b.attention.output.bias.normal_()), TOKENS),
        (block(lambda b: b.attention.output.bias.fill_(2)), TOKENS),
    ],
    "exposing, input 1: block is not what the function takes": lambda: [
        (cl.Gpt2(cl.Gpt2Config.preset("toy")).blocks[0], TOKENS)
    ],
    "exposing, input 1: the tokens have 32 coordinates, and the block takes 64": lambda: [(block(), TOKENS[..., :32])],
    "input 1: texts of 40 tokens; 32 are enough": lambda: [(block(width=8, n_heads=2), torch.ones(1, 40, 8))],
    "input 1: the block is not as in the chapter": lambda: [(block(ista_residual=True), TOKENS)],
    "exposing, input 1: z: numbers are not finite": lambda: [(block(), TOKENS / 0)],
    "exposing, input 1: the block is not .*": lambda: [(block(lambda b: b.ista.D.fill_(torch.nan)), TOKENS)],
    "exposing raises AttributeError when input 1 is tried, where one that fits block, z was expected": lambda: [
        (block(lambda b: delattr(b.attention, "output")), TOKENS)
    ],
}


def normed(b, z):
    return b.attention_norm(z)


def unfinished(b, y):
    code = F.relu(0.1 * y @ b.ista.D - 0.01)
    return b.neurons(code + 0.1 * (y - code @ b.ista.D.mT) @ b.ista.D)


def behind(b, z):
    half = b.attention_norm(z + b.attention(z))
    return b.ista_norm(b.ista.decode(b.neurons(b.ista.encode(half))))


def hooked(edit, layer_of=lambda layer: [layer], keep=False):
    """Logits with `edit(codes, neuron, value)` in the place of some layers' codes."""

    def function(model, tokens, layer, neuron, value):
        hooks = [
            model.blocks[i].neurons.register_forward_hook(lambda m, args, codes: edit(codes.clone(), neuron, value))
            for i in layer_of(layer)
        ]
        logits = model(tokens)
        for hook in [] if keep else hooks:
            hook.remove()
        return logits

    return function


def put(where):
    def edit(codes, neuron, value):
        codes[where(neuron)] = value
        return codes

    return edit


def everywhere(codes, i, value):
    return put(lambda i: (..., i))(codes, i, value)


def added(codes, i, value):
    codes[..., i] += value
    return codes


def scaled(codes, i, value):
    codes[..., i] *= value
    return codes


def where_it_fires(codes, i, value):
    codes[..., i] = torch.where(codes[..., i] > 0, value, 0.0)
    return codes


def logits_along(centre=True, still=False, weighted=True, power=1, ddof=0, use_eps=True, unit=False):
    """The derivative of LayerNorm's quotient, with one thing wrong."""

    def function(x, atom, weight, E, norm_eps):
        x = x - x.mean(1, keepdim=True)
        c = atom - atom.mean() if centre else atom
        s = (x.var(1, correction=ddof, keepdim=True) + (norm_eps if use_eps else 0)).sqrt()
        u = x / s
        du = c - (0 if still else u * (u @ c)[:, None] / (1 if unit else x.shape[1]))
        return du / s**power * (weight if weighted else 1) @ E.T

    return function


def counted(d, h, L, v, n):
    size = dict(n_layers=L, n_heads=2, width=d, vocab_size=v, context=n, expansion=h // d)
    models = [
        cl.Crate(cl.CrateConfig(**size)),
        cl.Gpt2(cl.Gpt2Config(**size)),
        cl.Gpt2(cl.Gpt2Config(**size, bias=True)),
    ]
    return dict(
        zip(("CRATE", "GPT-2", "OpenAI"), (sum(p.numel() for p in m.parameters()) for m in models), strict=True)
    )


def alone(model, tokens, layer, neuron, value):
    """A hook that is the only one on its site, and clears it when it is done."""
    site = model.blocks[layer].neurons
    site.register_forward_hook(lambda m, args, codes: everywhere(codes.clone(), neuron, value))
    try:
        return model(tokens)
    finally:
        site._forward_hooks.clear()


def tidied(model, tokens, layer, neuron, value):
    """The hook goes when there is an error, but not when there is an interruption."""
    hook = model.blocks[layer].neurons.register_forward_hook(
        lambda m, args, codes: everywhere(codes.clone(), neuron, value)
    )
    try:
        logits = model(tokens)
    except Exception:
        hook.remove()
        raise
    hook.remove()
    return logits


def thawed(model, *rest):
    model.requires_grad_(True)
    return hooked(everywhere)(model, *rest)


def replaced(model, tokens, layer, neuron, value):
    class Held(nn.Module):
        def forward(self, codes):
            return everywhere(codes.clone(), neuron, value)

    model.blocks[layer].neurons = Held()
    return model(tokens)


def overwritten(model, tokens, layer, neuron, value):
    before = model.blocks[layer].neurons.forward
    model.blocks[layer].neurons.forward = lambda codes: everywhere(codes.clone(), neuron, value)
    logits = model(tokens)
    model.blocks[layer].neurons.forward = before
    return logits


def push_by(differentiate):
    def function(x, atom, weight, E, norm_eps):
        return differentiate(lambda x: nn.functional.layer_norm(x, atom.shape, weight, eps=norm_eps) @ E.T, x, atom)

    return function


def without_gradients(*case):
    torch.set_grad_enabled(False)
    return hooked(everywhere)(*case)


def on_all_modules(model, tokens, layer, neuron, value):
    site = model.blocks[layer].neurons
    nn.modules.module.register_module_forward_hook(
        lambda m, args, out: everywhere(out.clone(), neuron, value) if m is site else None
    )
    return model(tokens)


def marked(model, *rest):
    model.edited = True
    return hooked(everywhere)(model, *rest)


WRONG = {
    "5.A": {
        "CRATE: .* the head is the token embedding": count(CRATE=lambda d, h, L, v, n: v * d),
        "CRATE: .* for each of the n positions": count(CRATE=lambda d, h, L, v, n: -n * d),
        "the dictionary encodes and decodes": count(CRATE=lambda d, h, L, v, n: L * h * d),
        "query, key and value are one matrix": count(CRATE=lambda d, h, L, v, n: 2 * L * d * d),
        "MSSA has an output matrix": count(CRATE=lambda d, h, L, v, n: -L * d * d),
        "MSSA's output matrix has a bias": count(CRATE=lambda d, h, L, v, n: -L * d),
        "each LayerNorm of CRATE has a weight and a bias": count(CRATE=lambda d, h, L, v, n: -(2 * L + 1) * d),
        "CRATE: .* one more LayerNorm": count(CRATE=lambda d, h, L, v, n: -2 * d),
        "query, key and value are three matrices": count(GPT2=lambda d, h, L, v, n: -2 * L * d * d),
        "an MLP has two matrices": count(GPT2=lambda d, h, L, v, n: -L * h * d),
        "the GPT-2 of the comparison has no biases": count(GPT2=lambda d, h, L, v, n: (2 * L + 1) * d),
        "all its matrices have biases": count(OpenAI=lambda d, h, L, v, n: -L * (5 * d + h)),
        "the bias of query, key and value has 3d": count(OpenAI=lambda d, h, L, v, n: -2 * L * d),
        "the bias of the first MLP matrix has h": count(OpenAI=lambda d, h, L, v, n: L * (d - h)),
        "find the one you have forgotten": count(OpenAI=lambda d, h, L, v, n: 1),
        "OpenAI: a number is needed; got None": lambda *size: {**count()(*size), "OpenAI": None},
        "parameters: 1 of 3 right. Go through your reasons": at_first(
            count(CRATE=lambda d, h, L, v, n: v * d, GPT2=lambda d, h, L, v, n: v * d)
        ),
        "GPT-2: a number is needed; got a str": lambda *size: {**count()(*size), "GPT-2": "124M"},
        "CRATE: .* you say nan": count(CRATE=lambda *_: float("nan")),
        "CRATE: .* you say 4,256.5, the module has 4,256": count(CRATE=lambda *_: 0.5),
        "CRATE: for d=12, h=24, L=3": count(CRATE=lambda d, h, L, v, n: (L == 3) * d),
        "GPT-2: for d=8, h=40, L=1": count(GPT2=lambda d, h, L, v, n: (n > h - d - 3 and L == 1) * d),
        "is right, but calls cratelab's .*: count on paper": counted,
        "with the keys CRATE, GPT-2, OpenAI": lambda d, h, L, v, n: {"CRATE": 1},
    },
    "5.B": {
        "change_of_block: 6 of 8 right. Go through": at_first(say(moved="changed", longer="same")),
        "permuted: .* DA is a sum over atoms": say(permuted="changed"),
        "flipped: .* do not fire on the same tokens": say(flipped="same"),
        "turned: .* the output matrix undoes the turn": say(turned="changed"),
        "louder: .* scores are products of two": say(louder="same"),
        "shuffled: .* a block knows no positions": say(shuffled="changed"),
        "moved: .* no path leads around both": say(moved="changed"),
        "longer: .* to tokens three times as long": say(longer="same"),
        "forgetful: .* which forgets the length": say(forgetful="changed"),
        'should return "same" or "changed" .*; moved is a str': say(moved="no"),
        'should return "same" or "changed" .*; turned is a list': say(turned=["same"]),
        'should return "same" or "changed" .*; louder is a dict': say(louder={}),
        'should return "same" or "changed" .*; it returns None': lambda: None,
    },
    "5.C": {
        **hunts(exposing, (load_reference("crate", "toy").blocks[1], 3 * TOKENS)),
        **{message: in_place_of("exposing", answer) for message, answer in INPUTS.items()},
        ": the normalised tokens are carried on, where the residual path takes the tokens themselves$": forward(normed),
        ": both halves use attention_norm: .* of its own$": forward(second="attention_norm"),
        ": MSSA's output bias is lost$": forward(bias=False),
        "carried on, .*; and both halves use .* of its own$": forward(normed, second="attention_norm"),
        "carried on, .*; and both halves .*; and MSSA's output bias": forward(normed, "attention_norm", bias=False),
        r"raises TypeError for z of .*, where a tensor \(1, 5, 8\) was expected: the block itself cannot be called": (
            lambda block, z: block(z)
        ),
        "texts are mixed: each of a batch": lambda b, z: forward()(b, z).mean(0, keepdim=True).expand(z.shape),
        "texts are mixed": lambda b, z: (
            b.ista.decode(b.neurons(b.ista.encode(b.ista_norm(z + b.attention(b.attention_norm(z))))))
            .mean(0, keepdim=True)
            .expand_as(z)
        ),
        "No common mistake explains it": lambda b, z: b.ista.decode(
            b.neurons(b.ista.encode(b.ista_norm(z + b.attention(b.attention_norm(z)).mean(0, keepdim=True))))
        ),
        "no gradient comes back to z: a block": torch.no_grad()(lambda b, z: forward()(b, z)),
        "the gradient that comes back to z is not the slope": lambda b, z: forward(lambda b, z: z.detach())(b, z),
        "changes its arguments in place": lambda b, z: forward()(b, z.add_(0.0).mul_(1.5).div_(1.5).add_(1e-9)),
        "there is no residual around ISTA": forward(add=True),
        "MSSA takes the tokens as they are: attention_norm comes first": lambda b, z: b.ista.decode(
            b.neurons(b.ista.encode(b.ista_norm(z + b.attention(z))))
        ),
        "nothing is carried around MSSA": forward(lambda b, z: 0),
        "the LayerNorms stand behind the sums": behind,
        "the codes do not pass through block.neurons": forward(last=lambda b, y: b.ista.encode(y)),
        "has not gone through the last threshold": forward(last=unfinished),
        "No common mistake": forward(last=lambda b, y: b.neurons(F.relu(y @ b.ista.D))),
        r"returns the shape \(1, 5, 32\)": lambda b, z: b.neurons(b.ista.encode(b.ista_norm(z))),
    },
    "5.D": {
        "leaves torch changed: whether gradients are kept": without_gradients,
        "leaves torch changed: .* or hooks on all modules": on_all_modules,
        "with_neuron leaves the model changed: take hooks and settings": marked,
        "No common mistake .*|set only where|differs from": lambda model, tokens, layer, neuron, value: (
            hooked(everywhere)(model, tokens, layer, neuron, value) if value else model(tokens)
        ),
        "nothing has changed": lambda model, tokens, *_: model(tokens),
        "it should take its place": hooked(added),
        "it should be the value": hooked(scaled),
        "layers are counted from 0": hooked(everywhere, lambda layer: [layer - 1]),
        "only the last token's code is set": hooked(put(lambda i: (slice(None), -1, i))),
        "all neurons of one token are set": hooked(put(lambda i: (slice(None), i))),
        "all neurons are set": hooked(put(lambda i: ...)),
        "the neuron is set in every layer": hooked(everywhere, lambda layer: [0, 1, 2]),
        "set only where it fires": hooked(where_it_fires),
        "leaves the model changed": hooked(everywhere, keep=True),
        "leaves the model changed: take hooks": replaced,
        "leaves the model .*changed": overwritten,
        "an error in the model leaves": hooked(everywhere),
        "a cell that is interrupted leaves": tidied,
        "leaves the model changed: take .*settings": thawed,
        "takes away a hook that somebody else has put there": alone,
        "No common mistake": hooked(lambda codes, i, value: everywhere(codes, i + 1, value)),
    },
    "5.E": {
        "right elsewhere, but .*norm_eps tiny": lambda x, atom, w, E, e: logits_along()(x, atom, w, E, max(e, 1e-5)),
        "the atom's product with the embeddings": lambda x, atom, w, E, e: (E @ atom).expand(len(x), -1),
        "the atom's mean is not taken off": logits_along(centre=False),
        "is right, but uses automatic differentiation": push_by(
            lambda f, x, atom: torch.autograd.functional.jvp(f, x, atom.expand_as(x))[1]
        ),
        "uses automatic differentiation: derive": push_by(
            lambda f, x, atom: torch.stack(
                [torch.func.jacrev(f)(row[None])[0, :, 0] @ atom for row in x]  # torch.func.jvp warns when it is loaded
            )
        ),
        "only, as a quotient of differences would be|right elsewhere, but .*a token may be constant or tiny": push_by(
            lambda f, x, atom: (f(x + 1e-6 * atom) - f(x - 1e-6 * atom)) / 2e-6
        ),
        "loops over tokens": lambda x, *rest: torch.cat([logits_along()(row[None], *rest) for row in x]),
        "the standard deviation is taken as fixed": logits_along(still=True),
        "mean and standard deviation are taken as fixed": logits_along(centre=False, still=True),
        "is taken off d times": logits_along(unit=True),
        "LayerNorm's weight is lost": logits_along(weighted=False),
        "torch.std and torch.var divide by d": logits_along(ddof=1),
        "norm_eps is lost": logits_along(use_eps=False),
        "divided by the variance": logits_along(power=2),
        r"is it transposed": lambda *case: logits_along()(*case).T,
        "No common mistake": lambda x, atom, w, E, e: nn.functional.layer_norm(x * atom, atom.shape, w, eps=e) @ E.T,
    },
}
