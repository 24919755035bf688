# %% [markdown]
# # Exercises to chapter 3: which step compresses?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before.
# The tokens `z` are rows, of shape `(n, d)`; the bases `U` have the shape `(k, d, p)`; all numbers are in double precision. With $W_k = U_k^\top Z$ and $s = \frac{p}{n\varepsilon^2}$,
#
# $$
# \nabla R^c = s\sum_{k=1}^K U_k\,W_k\,\big(I + s\,W_k^\top W_k\big)^{-1}, \qquad
# \mathrm{MSSA}(Z) = \sum_{k=1}^{K} U_k\,W_k\,\mathrm{softmax}\!\big(W_k^\top W_k/\sqrt p\,\big).
# $$

# %%
import math

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange

import cratelab as cl
from cratelab import plots
from cratelab.checks import mssa as check

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 3.A: If tokens become twice as long
#
# - **Goal:** predict how the exact step, Gram attention and softmax attention grow with the tokens.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# There are many more tokens than the dimension $p$ of a subspace, in general position, and their mean is not zero. All of them are multiplied by a factor $c$. An expression that is multiplied by $c^a$ has the exponent $a$.
# Predict the exponents of
#
# - `exact_small`: $\nabla R^c$, tokens far shorter than $\varepsilon$,
# - `exact_large`: $\nabla R^c$, tokens far longer than $\varepsilon$,
# - `gram`: Gram attention $\sum_k U_kW_k(W_k^\top W_k)$,
# - `softmax_small`: $\mathrm{MSSA}$, tokens tiny,
# - `softmax_centred`: $\mathrm{MSSA}$, tokens tiny, and their mean has been subtracted,
# - `softmax_large`: $\mathrm{MSSA}$, tokens huge.
#
# The check will measure them.


# %%
def exponents():
    """{"exact_small": …, "exact_large": …, "gram": …, "softmax_small": …, …}"""
    # BEGIN SOLUTION
    return {
        **{"exact_small": 1, "exact_large": -1, "gram": 3},
        **{"softmax_small": 1, "softmax_centred": 3, "softmax_large": 1},
    }
    # END SOLUTION


# %% tags=["check"]
check.exponents(exponents)

# %% [markdown] tags=["hint"]
# In the eigenbasis of $W_kW_k^\top$ the gradient multiplies a singular value $\sigma$ by $s/(1 + s\sigma^2)$. What is left of that for small and for large $\sigma$?

# %% [markdown] tags=["hint"]
# Scores are products of two tokens. When all scores are nearly 0, which weights does the softmax give? And when they are very far apart?

# %% [markdown] tags=["solution"]
# `exact_small` is 1 and `exact_large` is $-1$: the factor $s\sigma/(1+s\sigma^2)$ rises like $\sigma$ and falls like $1/\sigma$, and the turning point $s\sigma^2 = 1$ is where the series begins to diverge. `gram` is 3 at every size, which is why Gram
# attention explodes. Softmax attention returns *means of tokens*, so its exponent is 1 at both ends: tiny tokens get the mean of all, huge ones a single token. Only if the mean is zero does the next term show, $Cw_i/\sqrt p$ with the covariance $C$ (derived in the chapter's appendix),
# and it has the exponent of Gram attention.
#
# For long tokens the exact step ends with the exponent $-1$, Gram attention with 3 and softmax attention with 1. Functions that grow with different powers can come close to each other at one length, not along the way: the quickest way to see that the softmax is a decision,
# and no approximation.

# %% [markdown]
# ## Exercise 3.B: An attention that passes its test
#
# - **Goal:** find three bugs that a symmetric example hides.
# - **Difficulty:** 2 of 5
# - **Time:** 25 minutes
#
# Somebody wrote $\mathrm{MSSA}$ and tested it on a regular polygon. The test passes, and the function is wrong in three places.


# %%
def plausible_mssa(z, U):
    w = einsum(z, U, "n d, k d p -> k n p")
    scores = einsum(w, w, "k i p, k j p -> k i j") / U.shape[1] ** 0.5
    weights = scores.softmax(-2)
    return einsum(weights, z, "k i j, j d -> i d")


angle = 2 * math.pi * torch.arange(7) / 7
polygon = torch.stack([angle.cos(), angle.sin()], dim=1)
torch.testing.assert_close(plausible_mssa(polygon, torch.eye(2)[None]), cl.mssa(polygon, torch.eye(2)[None]))
print("the author's test passes")

# %% [markdown]
# What is special about one head that is the whole plane, and about the corners of a polygon? Hand in *inputs* that expose the bugs. The check gives each to the right function and to functions with one bug only.
# It names a bug when an input shows it and no other that is still unknown: what shows several at once says that something is wrong, not what. Change one thing at a time, in at most six inputs.


# %%
def exposing():
    """A list of inputs (z, U), with orthonormal columns in each U[k]."""
    # BEGIN SOLUTION
    plane = torch.eye(3)[None, :, :2]
    in_the_plane = torch.cat([polygon, torch.zeros(7, 1)], dim=1)
    return [(torch.randn(7, 2), torch.eye(2)[None]), (in_the_plane, plane), (torch.ones(1, 3), plane)]
    # END SOLUTION


# %% tags=["check"]
check.exposing(exposing)

# %% [markdown]
# Then write the function as it should be. Do not call the library.


# %%
def mended_mssa(z, U):
    """MSSA of z (n, d) with U (k, d, p), no mask: (n, d)."""
    # BEGIN SOLUTION
    w = einsum(z, U, "n d, k d p -> k n p")
    scores = einsum(w, w, "k i p, k j p -> k i j") / U.shape[2] ** 0.5
    attended = einsum(scores.softmax(-1), w, "k i j, k j p -> k i p")
    return einsum(attended, U, "k n p, k d p -> n d")
    # END SOLUTION


# %% tags=["check"]
check.mended_mssa(mended_mssa, exposing)

# %% [markdown] tags=["hint"]
# With one head that is the whole plane $p = d$ and $U_kU_k^\top = I$. Which two lines would change if the tokens had a third coordinate that the head does not see?

# %% [markdown] tags=["hint"]
# Seen from each corner of a regular polygon the others look alike. So the row sums of $e^{\text{scores}}$ are all equal, and by symmetry so are the column sums. What does `softmax(-2)` divide by?

# %% [markdown] tags=["solution"]
# `U.shape[1]` is $d$ and should be $p$; `softmax(-2)` runs over the queries and should run over the keys, `-1`; and the values must be the projections `w`, lifted back by `U`, not the tokens. With $K=1$, $U = I$ the first and the last cannot be seen. A polygon that lies in a plane of three dimensions shows the first alone, and a single token, which attends to itself whatever its score, the last alone.
# The second hides wherever $W^\top W$ has equal row sums after the exponential. Because query and key are tied here, the scores are symmetric, so the wrong axis gives the *transpose* of the right map, and shapes, sums and pictures all look healthy. One
# property tells: over the keys the weights of each query sum to 1, so a token can only get back a mean of tokens.

# %% tags=["solution"]
z = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
scores = z @ z.T / 2**0.5
print("weights of the three queries, over the keys:   ", scores.softmax(-1).sum(1).numpy().round(2))
print("weights of the three queries, over the queries:", scores.softmax(-2).sum(1).numpy().round(2))

# %% [markdown]
# ## Exercise 3.C: Attention that costs no $n^2$
#
# - **Goal:** derive the first-order step without its second assumption, and compute it in time linear in $n$.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Cut the inverse in $\nabla R^c$ after the first order, and take the step $Z - \kappa\,(\dots)$. The subspaces may overlap and need not fill the space, so $\sum_kU_kU_k^\top$ stays as it is.
# Then implement the step so that twice as many tokens cost twice as much: no $n\times n$ matrix anywhere. The check will count the multiplications. Do not call the library.


# %%
def first_order_step(z, U, step_size, eps):
    """Z − κ times the first-order gradient, (n, d), for z (n, d), U (k, d, p), κ and ε."""
    # BEGIN SOLUTION
    s = U.shape[2] / (len(z) * eps**2)
    w = einsum(z, U, "n d, k d p -> k n p")
    moments = einsum(w, w, "k n p, k n q -> k p q")
    gradient = s * (w - s * w @ moments)
    return z - step_size * einsum(gradient, U, "k n p, k d p -> n d")
    # END SOLUTION


# %% tags=["check"]
check.first_order_step(first_order_step)

# %% [markdown] tags=["hint"]
# $(I + X)^{-1} \approx I - X$ with $X = s\,W_k^\top W_k$. Two terms are left, one with $s$ and one with $s^2$.

# %% [markdown] tags=["hint"]
# $W_k(W_k^\top W_k) = (W_kW_k^\top)W_k$, and $W_kW_k^\top$ is $p\times p$. In code, where tokens are rows: `w @ (w.mT @ w)`.

# %% [markdown] tags=["solution"]
# $$
# Z^+ = Z - \kappa s\sum_k U_kW_k + \kappa s^2\sum_k U_k\,(W_kW_k^\top)\,W_k .
# $$
#
# The same product, bracketed in the other way, is attention without attention weights. Read $W_k^\top W_k$ first and each token looks at all others; read $W_kW_k^\top$ first and there is one $p\times p$ matrix, the moments of the crowd, that moves all tokens alike.
# This is *linear attention*, and its weakness is in the second reading: a matrix that is the same for all tokens cannot treat one token differently. The softmax forbids the other bracketing; that is its price, and its point.
#
# What goes wrong most often: one $s$ too few (the gradient brings one, the series the other), and $Z$ written for $\sum_kU_kU_k^\top Z$ out of habit. How much that habit costs with two overlapping subspaces:

# %% tags=["solution"]
z, U = 0.1 * torch.randn(50, 6), torch.linalg.qr(torch.randn(2, 6, 3)).Q
exact = cl.compression_step(z, U, 0.5, 1.0) - z
for name, moved in [
    ("as it is", first_order_step(z, U, 0.5, 1.0)),
    ("written as Z", cl.attention_step(z, U, 0.5, 1.0, cl.gram_attention)),
]:
    print(f"ΣUUᵀZ {name:12}: the update is off by {float((moved - z - exact).norm() / exact.norm()):.1%}")

# %% [markdown]
# ## Exercise 3.D: The causal layer, axis by axis
#
# - **Goal:** write the layer of the network in einops, with its mask.
# - **Difficulty:** 3 of 5
# - **Time:** 25 minutes
#
# Write what `cl.Mssa` computes, for a batch of texts `z` of shape `(b, n, d)`, from its parameters: `projection` $(d, d)$ holds $U_k^\top$ in its rows $kp$ to $(k+1)p$ ($k$ from 0), `output` $(d, d)$ is $W_{\text{out}}$, `bias` has the shape $(d,)$. Token $i$ sees the keys $j\le i$.
# No loop over texts, heads or tokens, and neither `scaled_dot_product_attention` nor the library.


# %%
def causal_layer(z, projection, output, bias, n_heads):
    """W_out [SSA_1; …; SSA_K] + b with a causal mask, (b, n, d)."""
    # BEGIN SOLUTION
    w = rearrange(z @ projection.T, "b n (k p) -> b k n p", k=n_heads)
    scores = einsum(w, w, "b k i p, b k j p -> b k i j") / w.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    attended = einsum(weights, w, "b k i j, b k j p -> b k i p")
    return rearrange(attended, "b k n p -> b n (k p)") @ output.T + bias
    # END SOLUTION


# %% tags=["check"]
check.causal_layer(causal_layer)

# %% [markdown]
# A leak shows without any formula: change the last token, and see which outputs notice.

# %%
layer, text = cl.Mssa(width=12, n_heads=3).requires_grad_(False), torch.randn(1, 6, 12)
changed = text.clone()
changed[0, -1] += 1
mine = [
    torch.as_tensor(causal_layer(x, layer.projection.weight, layer.output.weight, layer.output.bias, 3))
    for x in (text, changed)
]
print("positions that notice a change of the last token:", (mine[0] != mine[1]).any(-1)[0].nonzero().flatten().tolist())
print("equal to cl.Mssa:", torch.allclose(mine[0], layer(text)))

# %% [markdown] tags=["hint"]
# `rearrange(…, "b n (k p) -> b k n p", k=n_heads)` says which rows belong to which head: in `(k p)` the head is the slow index. `(p k)` would deal the rows out like cards.

# %% [markdown] tags=["hint"]
# What is masked must have the *weight* 0 while the others sum to 1. Which score has that weight? `torch.ones(n, n).triu(1)` is 1 above the diagonal, where the key comes after the query.

# %% [markdown] tags=["solution"]
# A score of $-\infty$ has the weight $e^{-\infty} = 0$, and the softmax shares out the rest. Two tempting shortcuts fail. A score of 0 is a score like any other, with the weight $e^0 = 1$: the future leaks. And weights set to 0 *after* the softmax have already been divided by
# a sum in which the future took part: early tokens come out short, by an amount that tells them about the future. Both have the right shape, and a loss that is better than it should be.
#
# The diagonal stays: the first token has nobody but itself. Mask it, too, and its row is all $-\infty$, which gives `nan`.

# %% [markdown]
# ## Exercise 3.E: When does the series break?
#
# - **Goal:** turn an error that is allowed into a length of tokens, and measure what happens beyond.
# - **Difficulty:** 4 of 5
# - **Time:** 30 minutes
#
# Cut after order $m$, the series replaces the factor $\frac{1}{1+x}$ on a direction of strength $x = s\sigma^2$ by $\sum_{j\le m}(-x)^j$. All tokens are multiplied by $c$. What is the largest $c$ for which no direction of any head has a relative error above `tolerance`?
# Derive a closed form and implement it; no search.


# %%
def largest_stretch(z, U, eps, order, tolerance):
    """The largest factor on z (n, d) at which the series up to `order` is right to `tolerance` in every direction."""
    # BEGIN SOLUTION
    n, p = len(z), U.shape[2]
    w = einsum(z, U, "n d, k d p -> k n p")
    strongest = p / (n * eps**2) * torch.linalg.matrix_norm(w, 2).square().max()
    return (tolerance ** (1 / (order + 1)) / strongest).sqrt()
    # END SOLUTION


# %% tags=["check"]
check.largest_stretch(largest_stretch)

# %% [markdown]
# First: do more terms help tokens that a LayerNorm has made $\sqrt d$ long? Second: eight first-order steps just inside and just outside of the radius of convergence.

# %%
U = rearrange(torch.linalg.qr(torch.randn(32, 32)).Q, "d (k p) -> k d p", k=4)
z = torch.nn.functional.layer_norm(torch.randn(128, 32), (32,))
lengths = {m: 32**0.5 * float(largest_stretch(z, U, 0.5, m, 0.01)) for m in (0, 1, 2, 4, 8, 16, 64)}
fig, axs = plt.subplots(1, 2, figsize=(8.4, 3.1))
axs[0].plot(lengths.keys(), lengths.values(), color=plots.CRATE, marker="o")
axs[0].axhline(32**0.5, color="grey", ls="-.", label="after LayerNorm")
axs[0].set(xlabel="order m of the series", ylabel="longest tokens, error 1 %", ylim=(0, 6))
for factor, color in [(0.95, plots.CRATE), (1.05, plots.PALETTE[1])]:
    moved = factor * z * float(largest_stretch(z, U, 0.5, 1, 1.0))
    rates = [float(cl.subspace_rate(moved, U, 0.5))]
    for _ in range(8):
        moved = moved - 2 * cl.neumann_gradient(moved, U, 0.5, order=1)
        rates.append(float(cl.subspace_rate(moved, U, 0.5)))
    print(f"{factor} of the radius, Rᶜ after 0 to 8 steps:", ", ".join(f"{float(f'{rate:.1g}'):g}" for rate in rates))
    axs[1].semilogy(rates, color=color, marker="o", label=f"{factor} of the radius")
axs[1].set(xlabel="first-order steps", ylabel="$R^c$ (nats)")
for ax in axs:
    ax.legend()
plt.show()

# %% [markdown] tags=["hint"]
# The rest of a geometric series: $\frac{1}{1+x} - \sum_{j\le m}(-x)^j = \frac{(-x)^{m+1}}{1+x}$. Divide by what it should be.

# %% [markdown] tags=["hint"]
# The relative error grows with $x$, so the strongest direction of the strongest head decides: $s\lVert W_k\rVert^2$ in the spectral norm. What does $c$ do to $x$?

# %% [markdown] tags=["solution"]
# The relative error of a direction is exactly $x^{m+1}$. Stretched tokens have $c^2x$, and $(c^2x_{\max})^{m+1} = \tau$ gives
#
# $$
# c = \sqrt{\frac{\tau^{1/(m+1)}}{s\,\max_k\lVert W_k\rVert^2}} .
# $$
#
# Terms help less and less: as $m\to\infty$ the numerator tends to 1, the radius of convergence, and no order reaches tokens as long as LayerNorm makes them. The right panel is the sharper warning. Inside, every first-order step lowers $R^c$. Five per cent outside, the strongest
# direction has $x > 1$ and a factor above 1; all others still shrink, so for some steps nothing looks wrong, and then that one direction runs away. Of the slips, the mean over heads or directions is the dangerous one: the error that matters is in the
# direction that tokens use most.
