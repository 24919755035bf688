# %% [markdown]
# # Exercises to chapter 5: what does a whole layer do?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before.
# A CRATE block takes tokens $Z$, of shape `(b, n, d)`, and hands on
#
# $$
# D\,\mathrm{ISTA}\big(\mathrm{LN}_2(Z^{1/2})\big), \qquad Z^{1/2} = Z + \mathrm{MSSA}\big(\mathrm{LN}_1(Z)\big).
# $$
#
# There are $K$ subspaces of dimension $p = d/K$, $h$ atoms, $L$ layers and $v$ tokens in the vocabulary.

# %%
import torch
import torch.nn.functional as F
from einops import einsum, rearrange

import cratelab as cl
from cratelab.checks import crate as check
from cratelab.corpora import tinyworld
from cratelab.experiments.reference_models import load_reference

torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 5.A: Parameters by hand
#
# - **Goal:** know every tensor of three models, and arrive at a famous number.
# - **Difficulty:** 2 of 5
# - **Time:** 25 to 30 minutes
#
# The chapter counted layers with $h = 4d$ and left out the positions. Count everything: token embedding (which is also the head), a vector for each of $n$ positions, layers, and the LayerNorm before the head,
# of CRATE, of the GPT-2 of the comparison (no biases anywhere), and of OpenAI's GPT-2 (a bias with every matrix but the embeddings, and in every LayerNorm). Count before you look at a module.


# %%
def parameters(d, h, L, v, n):
    """{"CRATE": …, "GPT-2": …, "OpenAI": …}, exact integers."""
    # BEGIN SOLUTION
    embeddings = v * d + n * d
    crate = L * (d * d + d * d + d + h * d + 2 * 2 * d) + 2 * d
    gpt2 = L * (3 * d * d + d * d + 2 * h * d + 2 * d) + d
    biases = L * (3 * d + d + h + d + 2 * d) + d
    return {"CRATE": embeddings + crate, "GPT-2": embeddings + gpt2, "OpenAI": embeddings + gpt2 + biases}
    # END SOLUTION


# %% tags=["check"]
check.parameters(parameters)

# %% [markdown]
# OpenAI's smallest GPT-2 has $d = 768$, $h = 3072$, 12 layers, 50,257 tokens and 1,024 positions. People call it "124M":

# %%
for model, count in parameters(768, 3072, 12, 50257, 1024).items():
    print(f"{model:6} {count:12,}")

# %% [markdown] tags=["hint"]
# Go through the block in the order in which a token does: LayerNorm, query, key and value, output, LayerNorm, then ISTA or the MLP. Which of them are one matrix in CRATE?

# %% [markdown] tags=["hint"]
# CRATE has biases in exactly two kinds of places: its LayerNorms (weight and bias, $2d$ each) and the output matrix of MSSA.

# %% [markdown] tags=["solution"]
# A CRATE layer has $2d^2 + hd$ in matrices and $5d$ besides, a layer of the comparison's GPT-2 $4d^2 + 2hd$ and $2d$, and OpenAI's another $7d + h$ in biases. Around the layers stand $(v + n)d$ and the last LayerNorm.
# With a head of its own the smallest GPT-2 would have 163 million: the embedding is nearly a third of it, so forgetting that the head is tied is the dearest slip here. The cheapest, the biases,
# is below a tenth of a per cent, and is the one that makes a checkpoint refuse to load.

# %% [markdown]
# ## Exercise 5.B: Eight changes, before you measure
#
# - **Goal:** know what a block cannot see.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# Here are eight changes of a *trained* CRATE block, or of what goes into it. Does the block hand on the same tokens? Predict, by paper alone.
#
# | key | change |
# |---|---|
# | `"permuted"` | the atoms, columns of $D$, are put in another order |
# | `"flipped"` | half of the atoms are replaced by their negatives |
# | `"turned"` | every basis $U_k$ becomes $U_kQ_k$ with an orthogonal $Q_k$, and in the output matrix the columns of head $k$ are multiplied by $Q_k$ too |
# | `"louder"` | all $U_k$ are doubled, and the output matrix (not its bias) is halved |
# | `"shuffled"` | the tokens before the last are shuffled; look at what is handed on for the last |
# | `"moved"` | 3 is added to every coordinate of every token |
# | `"longer"` | every token is multiplied by 3 |
# | `"forgetful"` | as `"longer"`, in a block without the residual around MSSA: $Z^{1/2} = \mathrm{MSSA}(\mathrm{LN}_1(Z))$ |


# %%
def change_of_block():
    """{key: "same" or "changed"}"""
    # BEGIN SOLUTION
    return {
        "permuted": "same",
        "flipped": "changed",
        "turned": "same",
        "louder": "changed",
        "shuffled": "same",
        "moved": "same",
        "longer": "changed",
        "forgetful": "same",
    }
    # END SOLUTION


# %% tags=["check"]
check.change_of_block(change_of_block)

# %% [markdown] tags=["hint"]
# For tokens: which paths lead from $Z$ to what is handed on, and which of them go through a LayerNorm? What does $\mathrm{LN}$ do with $z + c\,(1, \dots, 1)$ and with $3z$?

# %% [markdown] tags=["hint"]
# For subspaces: a head uses $U_k$ for the scores $w_i^\top w_j$ and for the values $w_j$. Follow both. For atoms: is $\mathrm{ReLU}(-x)$ of any use once $\mathrm{ReLU}(x)$ is known?

# %% [markdown] tags=["solution"]
# `permuted`: neurons have no order, so "neuron 17" of two trainings have nothing to do with each other. `turned`: nor have the coordinates within a head. What a head can mean is its subspace and its length, not its axes; an atom,
# in contrast, cannot be turned or flipped, since the threshold acts on each by itself. That is why one hopes to interpret *neurons*. `louder`: the values come out as before, the scores four times as large.
# `shuffled`: order reaches a block only through the position embeddings and the causal mask, and the last token is behind no mask.
#
# `moved` is the one that divides CRATE from GPT-2. Every token has a part along $(1, \dots, 1)$, and no half of the block can read it: all of it goes through a LayerNorm first. CRATE forgets it in one layer; GPT-2's residual stream
# carries it to the end:

# %% tags=["solution"]
z = torch.randn(1, 6, 64)
for kind, config in [(cl.Crate, cl.CrateConfig), (cl.Gpt2, cl.Gpt2Config)]:
    block = kind(config.preset("toy")).blocks[0].requires_grad_(False)
    moved = (block(z + 3) - block(z)).mean()
    print(f"{kind.__name__:5} tokens moved by 3, what is handed on moves by {abs(float(moved)):.1f}")

# %% [markdown] tags=["solution"]
# `longer` and `forgetful` say what the residual around MSSA does. The length of a token is its weight against what attention writes: long tokens are hardly changed by it. Without the residual the length is lost, and so is everything of the
# token that no subspace keeps. A common slip is to answer "same" for `longer`, because "LayerNorm takes the length away". It does, from what MSSA *reads*.

# %% [markdown]
# ## Exercise 5.C: A test before training
#
# - **Goal:** write a block from its parts, and learn when a test sees nothing.
# - **Difficulty:** 3 of 5
# - **Time:** 30 minutes
#
# Here is a forward pass that passes its author's test against the library. It is wrong in three places.


# %%
def plausible_forward(block, z):
    z = block.attention_norm(z)
    w = einsum(z, block.attention.U, "b n d, k d p -> b k n p")
    n, p = w.shape[2:]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    shares = (w @ w.mT / p**0.5).masked_fill(future, -torch.inf).softmax(-1)
    heads = rearrange(shares @ w, "b k n p -> b n (k p)")
    half = z + heads @ block.attention.output.weight.T
    codes = block.ista.encode(block.attention_norm(half))
    return block.ista.decode(block.neurons(codes))


def fresh_block():
    return cl.Crate(cl.CrateConfig.preset("toy")).blocks[0].requires_grad_(False)


fresh = fresh_block()
z = F.layer_norm(torch.randn(2, 10, 64), (64,))  # tokens of unit size
torch.testing.assert_close(plausible_forward(fresh, z), fresh(z), rtol=0, atol=1e-4)
print("the author's test passes")

# %% [markdown]
# Why does the author's test see none of them? Hand in *inputs* that expose the bugs: blocks and tokens. Make a block by `fresh_block()`, and change what you like in it, such as `block.attention.projection.weight.mul_(2)`, or take a trained one.
# The check gives each input to the right block and to blocks with one bug only, in double precision, and overlooks what the author's test overlooks, errors under a ten-thousandth. It names a bug when an input shows it and no other that is still unknown: what shows several at once
# says that something is wrong, not what. Change one thing at a time, in at most six inputs.


# %%
def exposing():
    """A list of inputs (block, z)."""
    # BEGIN SOLUTION
    other_norm, biased = fresh_block(), fresh_block()
    other_norm.ista_norm.bias.normal_()
    biased.attention.output.bias.normal_()
    return [(fresh_block(), 3 * z), (other_norm, z), (biased, z)]
    # END SOLUTION


# %% tags=["check"]
check.exposing(exposing)

# %% [markdown]
# Then write the block as it should be. You may use its parts, with fewer lines than the author: `block.attention_norm`, `block.attention` (MSSA with its output matrix), `block.ista_norm`, `block.ista` with `encode` and
# `decode`, and `block.neurons`, through which the codes have to pass. `block` itself cannot be called here. A block is there to be trained, so gradients have to pass through.


# %%
def mended_forward(block, z):
    """What the block hands on, (b, n, d), for tokens z (b, n, d)."""
    # BEGIN SOLUTION
    half = z + block.attention(block.attention_norm(z))
    codes = block.ista.encode(block.ista_norm(half))
    return block.ista.decode(block.neurons(codes))
    # END SOLUTION


# %% tags=["check"]
check.mended_forward(mended_forward, exposing)

# %% [markdown] tags=["hint"]
# What are the weights and biases of LayerNorms, and the bias of MSSA's output matrix, before training? And what does LayerNorm do to tokens that it has normalised already? A test sees nothing of what is 0 or 1 by chance.

# %% [markdown] tags=["hint"]
# Inputs: a trained block, `load_reference("crate", "toy").blocks[1]`, shows all three at once. So start from `fresh_block()` and the author's `z`, and change one: the length of the tokens, one LayerNorm of the two, or a bias. Moving all tokens by a number shows nothing, and nor does a bias that is the same for all coordinates: why?

# %% [markdown] tags=["hint"]
# The block: go through it with the equation beside it. Which path takes $Z$, and which takes $\mathrm{LN}_1(Z)$? Which of the four parts does the author's function not use, or use twice?

# %% [markdown] tags=["solution"]
# The first line overwrites `z`, so that the residual path carries normalised tokens; `attention_norm` is used for both halves; and the output's bias is lost. At the start of training all LayerNorms have weight 1 and bias 0,
# the bias is 0, and normalised tokens are their own LayerNorm: the test was made where the three cannot be seen. Longer tokens show the first, a LayerNorm that is not as new the second, a bias the third. (Not any bias: one that is the same for all coordinates
# is taken off by the next LayerNorm, as in 5.B. The same holds for tokens that are moved.) To see *that* something is wrong takes less: the same tokens and
# *trained* weights, or noise on every parameter, which is cheaper and what the check of the mended block does:

# %% tags=["solution"]
trained = load_reference("crate", "toy").blocks[1]
with torch.no_grad():
    for name, block in [("fresh", fresh), ("trained", trained)]:
        error = (plausible_forward(block, z) - block(z)).norm() / block(z).norm()
        print(f"{name:7} error of the plausible block: {float(error):.0%}")
        assert torch.allclose(mended_forward(block, z), block(z))

# %% [markdown] tags=["solution"]
# A test at the start of training is a test at a point of high symmetry. Break the symmetry first: random weights for *everything*, more than one head, more than one sequence, tokens that are not centred.

# %% [markdown]
# ## Exercise 5.D: Set one neuron
#
# - **Goal:** hook the site where codes pass, and see what one neuron does to the next word.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Run a model on `tokens` with one neuron held at a value: in layer `layer`, counted from 0, the code of neuron `neuron` is `value` at every token, and all others are as they come. Return the logits and leave the model as it was, even if the tokens are none that it knows.


# %%
def with_neuron(model, tokens, layer, neuron, value):
    """Logits (b, n, v) with one neuron held at a value, for tokens (b, n)."""

    # BEGIN SOLUTION
    def hold(module, inputs, codes):
        held = codes.clone()
        held[..., neuron] = value
        return held

    hook = model.blocks[layer].neurons.register_forward_hook(hold)
    try:
        return model(tokens)
    finally:
        hook.remove()
    # END SOLUTION


# %% tags=["check"]
check.with_neuron(with_neuron)

# %% [markdown]
# Now a trained model, and text of the little world of chapter 6. We switch off each neuron of the last layer that fires at all, and list what it costs on the words after which it fires, and on all others.

# %%
model = load_reference("crate", "toy")
world = tinyworld.generate(3_000, context=128)
text = torch.from_numpy(world.tokens[:1024].astype("int64")).view(8, 128)


def losses(logits):
    return F.cross_entropy(logits[:, :-1].mT, text[:, 1:], reduction="none")


with torch.no_grad():
    codes = []
    hook = model.blocks[1].neurons.register_forward_hook(lambda module, inputs, out: codes.append(out[:, :-1]))
    usual = losses(model(text))
    hook.remove()
    costs = []
    for neuron in codes[0].mean((0, 1)).argsort(descending=True)[:40].tolist():
        fires = codes[0][..., neuron] > 0
        cost = losses(torch.as_tensor(with_neuron(model, text, 1, neuron, 0.0))) - usual
        costs.append((float(cost[fires].mean()), float((cost * ~fires).abs().max())))
most, elsewhere = max(costs)
print(f"of 40 neurons, {sum(cost > 0 for cost, _ in costs)} are worth having where they fire")
print(f"the most useful one is worth {most:.2f} nats a word there; elsewhere the largest change is {elsewhere:.1f}")

# %% [markdown] tags=["hint"]
# `handle = model.blocks[layer].neurons.register_forward_hook(f)` calls `f(module, inputs, output)` after every forward pass of the site. What `f` returns, unless it is `None`, takes the output's place. `handle.remove()` ends it.

# %% [markdown] tags=["hint"]
# Codes are `(b, n, h)`: a neuron is `codes[..., neuron]`. Change a clone, not the output itself. And `try: … finally: …` removes the hook even if the tokens were wrong.

# %% [markdown] tags=["solution"]
# A last layer's neuron that is off at a token has no part in what follows that token, so switching it off costs exactly nothing there. In an earlier layer it would, since later tokens attend to those where it fired. What goes wrong most
# often is a hook that stays: the next measurement is then made on an edited model, without any error. The hook here is removed in `finally`, and the check looks for leftovers.
#
# The check finds the right logits without any hook: with no residual around ISTA a layer's output is $\sum_j a_jD_j$, so holding neuron $i$ at $a'$ moves it by $(a' - a_i)D_i$.

# %% [markdown]
# ## Exercise 5.E: From an atom to the words
#
# - **Goal:** derive what one atom of the last layer does to the logits, through the LayerNorm.
# - **Difficulty:** 4 of 5
# - **Time:** 30 minutes
#
# The last layer hands on $x = \sum_j a_jD_j$, and the logits are $E\,\mathrm{LN}(x)$ with
#
# $$
# \mathrm{LN}(x) = \gamma\odot\frac{x - \bar x}{s} + \beta, \qquad s^2 = \tfrac1d\textstyle\sum_i(x_i-\bar x)^2 + \epsilon .
# $$
#
# It is customary to read a neuron's meaning from $E D_i$, the words whose embeddings lie along its atom. But LayerNorm stands between, and it is not linear. Derive $\partial\,\mathrm{logits}/\partial a_i$ and implement it, for all tokens at once.
# No loop, and no automatic or numerical differentiation.


# %%
def push(x, atom, weight, E, norm_eps):
    """∂ logits/∂aᵢ, (n, v), for tokens x (n, d), an atom (d,), LayerNorm's weight (d,) and embeddings E (v, d)."""
    # BEGIN SOLUTION
    middle = x - x.mean(1, keepdim=True)
    s = (middle.square().mean(1, keepdim=True) + norm_eps).sqrt()
    unit = middle / s
    atom = atom - atom.mean()
    along = unit * (unit @ atom)[:, None] / x.shape[1]
    return ((atom - along) / s * weight) @ E.T
    # END SOLUTION


# %% tags=["check"]
check.push(push)

# %% [markdown]
# How often is the word that an atom pushes most the one that $E D_i$ promises? We take all 256 atoms of the trained model's last layer, at the words after which they fire.

# %%
model = load_reference("crate", "toy").requires_grad_(False)
world = tinyworld.generate(3_000, context=128)
text = torch.from_numpy(world.tokens[:512].astype("int64")).view(4, 128)
seen = {}
site = model.blocks[1].neurons
hook = site.register_forward_hook(lambda module, inputs, out: seen.update(codes=out.flatten(0, 1)))
model(text)
hook.remove()
E, D, codes = model.token_embedding.weight, model.blocks[1].ista.D, seen["codes"]
x = codes @ D.T
agree, n = 0, 0
for i in range(D.shape[1]):
    fires = codes[:, i] > 0
    best = torch.as_tensor(push(x[fires], D[:, i], model.norm.weight, E, model.norm.eps)).argmax(1)
    agree, n = agree + int((best == (E @ D[:, i]).argmax()).sum()), n + len(best)
own = torch.as_tensor(push(x, x[0], model.norm.weight, E, model.norm.eps))[0].abs().max()
print(f"the same word in {agree / n:.0%} of cases")
print(f"a push along the token itself changes no logit by more than {float(own):.0e}")

# %% [markdown] tags=["hint"]
# Go through the LayerNorm from the inside: $\bar x$, then $s$, then $u = (x - \bar x)/s$, then $\gamma\odot u + \beta$. If $x$ moves by $\mathrm dx = D_i$, which of these move with it?

# %% [markdown] tags=["hint"]
# Differentiate $u = (x - \bar x)/s$ by the quotient rule, with $\mathrm dx = D_i$. Two things move: the numerator, by the centred atom, and $s$. From $s^2$: $s\,\mathrm ds = \frac1d\sum_i (x_i - \bar x)\,\mathrm dx_i$.

# %% [markdown] tags=["hint"]
# The result is $\mathrm du = \frac1s\big(c - \frac1d u\,u^\top c\big)$, with $c$ the centred atom. Then come $\gamma$ and $E$. $\beta$ does not move.

# %% [markdown] tags=["solution"]
# $\partial\,\mathrm{logits}/\partial a_i = E\,\mathrm{diag}(\gamma)\,\frac1s\big(I - \tfrac1d uu^\top\big)\big(I - \tfrac1d 11^\top\big)D_i$. Both brackets are projections (the first up to $\epsilon$). The second removes what LayerNorm never lets through, the first the part along the
# token itself: making a token longer changes nothing after LayerNorm. So the same atom pushes other words at other tokens, and $1/s$ says that it pushes short tokens more.
#
# To read $ED_i$ is to leave out both, and the weight $\gamma$, which is not the same for all coordinates after training. The cell says how much that matters in this model. The usual slips: `torch.std`, which divides by $d - 1$; and to hold $s$ fixed, which is what
# people do, with a word of warning, when they attribute logits to neurons "with frozen LayerNorm".
