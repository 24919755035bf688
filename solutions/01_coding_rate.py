# %% [markdown]
# # Exercises to chapter 1: how many nats do tokens cost?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before.
# The tokens `z` are rows, of shape `(n, d)`; $\varepsilon$ is `eps`; all numbers are in double precision.
# With $c = \frac{d}{n\varepsilon^2}$ and the singular values $\sigma_i$ of the tokens, the rate is
#
# $$
# R(Z) = \tfrac12 \log\det\big(I + c\,ZZ^\top\big) = \tfrac12 \sum_i \log\big(1 + c\,\sigma_i^2\big).
# $$

# %%
import math

import matplotlib.pyplot as plt
import torch

import cratelab as cl
from cratelab import plots
from cratelab.checks import coding_rate as check

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 1.A: Four changes, before you measure
#
# - **Goal:** know what the rate sees, and what it does not.
# - **Difficulty:** 1 of 5
# - **Time:** 10 minutes
#
# A cloud of $n$ tokens in $d$ dimensions has rank $r < d$, and $\varepsilon \ll \sigma_i\sqrt{d/n}$ for all its non-zero singular values $\sigma_i$.
# By how many nats a token does the rate change if
#
# - `finer`: $\varepsilon$ becomes ten times smaller,
# - `rotated`: all tokens are turned by the same rotation,
# - `padded`: $d$ zeros are appended to every token, so that the same points live in $2d$ dimensions,
# - `diluted`: $n$ more tokens are added, all of them at the origin?
#
# Return the four numbers for a given `r`. Predict; do not compute a rate. The check will measure.


# %%
def change_of_rate(r):
    """{"finer": …, "rotated": …, "padded": …, "diluted": …} in nats a token."""
    # BEGIN SOLUTION
    half_bit = 0.5 * math.log(2)
    return {"finer": r * math.log(10), "rotated": 0.0, "padded": r * half_bit, "diluted": -r * half_bit}
    # END SOLUTION


# %% tags=["check"]
check.change_of_rate(change_of_rate)

# %% [markdown] tags=["hint"]
# At a fine precision each of the $r$ terms of the sum is $\frac12\log(c\,\sigma_i^2)$ to a good approximation, and the others are 0.

# %% [markdown] tags=["hint"]
# Which of $n$, $d$, $\varepsilon$ and $\sigma_i$ does each change touch? None of the last two adds or removes a singular value other than 0.

# %% [markdown] tags=["solution"]
# Only $c = \frac{d}{n\varepsilon^2}$ changes, never a singular value. `finer` multiplies $c$ by 100, so each of the $r$ directions in use pays
# $\frac12\log 100 = \log 10$ nats: the price of precision is paid once per *used* dimension, not per dimension. `rotated` changes nothing.
#
# `padded` surprises. No point has moved, yet the cloud costs half a bit more per direction. The error $\varepsilon^2$ is a total over all
# dimensions, and half of it now falls into the new ones, where it buys nothing. This is the excess $\frac r2\log\frac dr$ of the chapter, seen as
# a difference. `diluted` is the opposite: the rate is an average over tokens, and tokens at the origin need no precision of their own.
# What goes wrong most often is to think that $R$ depends on the points alone.
#
# The condition is $c\,\sigma_i^2 \gg 1$, written for $\varepsilon$. That $\varepsilon$ is far smaller than the $\sigma_i$ is not enough, since singular values grow with the
# number of tokens, and the precision is that of one token. In ten thousand tokens $\sigma = 1$ is a tiny reach:

# %% tags=["solution"]
n, d, r, eps = 10_000, 10, 3, 0.05
cloud = torch.linalg.qr(torch.randn(n, r)).Q @ torch.eye(r, d)  # r singular values of 1
change = float(cl.coding_rate(cloud, eps / 10) - cl.coding_rate(cloud, eps))
print(
    f"ε = {eps}, σ = 1, but σ√(d/n) = {math.sqrt(d / n):.3f}: finer costs {change:.2f} nats, not {r * math.log(10):.2f}"
)

# %% [markdown]
# ## Exercise 1.B: Three bugs that a test did not find
#
# - **Goal:** choose inputs that tell a right formula from a plausible one.
# - **Difficulty:** 2 of 5
# - **Time:** 20 minutes
#
# Somebody wrote a coding rate and tested it against the library. The test passes, and the function is wrong in three places.


# %%
def plausible_rate(z, eps):
    n, d = z.shape
    z = z - z.mean(0)
    gram = z.T @ z
    return 0.5 * torch.logdet(torch.eye(d) + n / (d * eps) * gram)


half = torch.randn(4, 8)
z = torch.cat([half, -half])
torch.testing.assert_close(plausible_rate(z, eps=1.0), cl.coding_rate(z, eps=1.0))
print("the author's test passes")

# %% [markdown]
# What is special about the author's tokens, and about the author's $\varepsilon$? Hand in *inputs* that expose the bugs. The check gives each to the right function and to functions with one bug only.
# It names a bug when an input shows it and no other that is still unknown: what shows several at once says that something is wrong, not what. Change one thing at a time, in at most six inputs.


# %%
def exposing():
    """A list of inputs (z, eps)."""
    # BEGIN SOLUTION
    square = torch.cat([half, -half])
    return [(square + 1, 1.0), (torch.cat([square, square]), 1.0), (square, 0.5)]
    # END SOLUTION


# %% tags=["check"]
check.exposing(exposing)

# %% [markdown]
# Then write the function as it should be. Do not call the library.


# %%
def mended_rate(z, eps):
    """The coding rate of z (n, d), in nats a token."""
    # BEGIN SOLUTION
    n, d = z.shape
    return 0.5 * torch.logdet(torch.eye(d) + d / (n * eps**2) * z.T @ z)
    # END SOLUTION


# %% tags=["check"]
check.mended_rate(mended_rate, exposing)

# %% [markdown] tags=["hint"]
# The author's tokens are as many as they have dimensions, they come in pairs $\pm z$, and $\varepsilon = 1$. Change one of the three at a time.

# %% [markdown] tags=["hint"]
# Three things any rate per token must do: give the same number when tokens and $\varepsilon$ are measured in other units; give the same number when
# every token is listed twice; give a larger number when the whole cloud is moved away from the origin. Break one, and leave the other two as the author had them.

# %% [markdown] tags=["solution"]
# `n / d` should be `d / n`, `eps` should be `eps**2`, and the mean is not to be subtracted: $\Sigma$ measures the reach from the origin, where the layers
# that follow start from too. With $n = d$, $\varepsilon = 1$ and tokens in pairs $\pm z$ all three are invisible, and an input that gives up one of these shows one bug. Each breaks one property:


# %% tags=["solution"]
def survives(rate):
    tokens = torch.randn(12, 5) + 1.0
    usual = rate(tokens, 0.5)
    return {
        "other units": bool(torch.isclose(rate(100 * tokens, 50.0), usual)),
        "listed twice": bool(torch.isclose(rate(torch.cat([tokens, tokens]), 0.5), usual)),
        "moved away": bool(rate(tokens + 5, 0.5) > usual + 1),
    }


for name, rate in [("plausible", plausible_rate), ("mended", mended_rate)]:
    print(f"{name:9}", survives(rate))

# %% [markdown] tags=["solution"]
# A property that must hold for *all* inputs finds what an example does not. Tests of `cratelab` are of this kind wherever that is possible.

# %% [markdown]
# ## Exercise 1.C: How many dimensions do you see?
#
# - **Goal:** derive the slope of the rate, and read it as a number of dimensions.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# *Dimension depends on the precision at which you look*, says the chapter, and reads it off a plot as a slope. Derive that slope: with
# $B = I + c\,ZZ^\top$,
#
# $$
# s(\varepsilon) = -\frac{\mathrm dR}{\mathrm d\log\varepsilon} .
# $$
#
# Find a closed form for it (on paper: it fits in two lines) and implement it. No numerical or automatic differentiation.


# %%
def seen_dimensions(z, eps):
    """−dR/d log ε, between 0 and the rank of z (n, d)."""
    # BEGIN SOLUTION
    n, d = z.shape
    gram = d / (n * eps**2) * z.T @ z
    return torch.linalg.solve(torch.eye(d) + gram, gram).trace()
    # END SOLUTION


# %% tags=["check"]
check.seen_dimensions(seen_dimensions)

# %% [markdown]
# What your function sees of a cloud with three wide directions, two that are ten times thinner, and one a hundred times:

# %%
values = torch.tensor([1.0, 1.0, 1.0, 0.1, 0.1, 0.01])
cloud = torch.linalg.qr(torch.randn(300, 6)).Q * values * math.sqrt(300)
grid = torch.logspace(-3.5, 1.5, 60)
seen = [float(seen_dimensions(cloud, float(eps))) for eps in grid]
fig, ax = plt.subplots(figsize=(5.6, 3))
ax.semilogx(grid, seen, color=plots.CRATE)
ax.set(xlabel="precision ε", ylabel="dimensions seen", title="three wide directions, two thinner, one thinnest")
plt.show()
print("seen at ε = 0.7, 0.05, 0.0005:", *(f"{seen_dimensions(cloud, eps):.1f}" for eps in (0.7, 0.05, 0.0005)))

# %% [markdown] tags=["hint"]
# $\mathrm d\log\det B = \operatorname{tr}(B^{-1}\,\mathrm dB)$, and $\varepsilon$ enters $B$ through $c$ only.

# %% [markdown] tags=["hint"]
# $c = \frac dn e^{-2\log\varepsilon}$, so $\mathrm dc/\mathrm d\log\varepsilon = -2c$. The 2 meets the ½.

# %% [markdown] tags=["solution"]
# $\mathrm dB = -2c\,ZZ^\top\,\mathrm d\log\varepsilon$, hence $s = \frac12\cdot 2\operatorname{tr}\big(B^{-1}cZZ^\top\big) = \sum_i \frac{c\sigma_i^2}{1+c\sigma_i^2}$.
# Each direction counts as a number between 0 (far thinner than the balls) and 1 (far wider). Statisticians know the formula as the *effective degrees
# of freedom* of ridge regression with the penalty $1/c$. Two slips are common: to lose the 2 of $\varepsilon^2$, which halves the count, and to forget $B^{-1}$, which makes
# it grow without limit. A count of dimensions can exceed neither $n$ nor $d$; that is worth checking before anything else.

# %% [markdown]
# ## Exercise 1.D: Which token does the rate care about?
#
# - **Goal:** differentiate a log-determinant by something that is not the tokens.
# - **Difficulty:** 4 of 5
# - **Time:** 30 minutes
#
# Give each token $z_i$ a weight $w_i$, with $\sum_i w_i = 1$; equal weights give the rate back:
#
# $$
# R_w = \tfrac12\log\det B, \qquad B = I + \frac{d}{\varepsilon^2}\sum_{i=1}^n w_i\, z_i z_i^\top .
# $$
#
# The *worth* of a token is $\partial R_w/\partial w_i$ at $w_i = 1/n$. The first step is $B$ in code, for any weights; its check confirms it.


# %%
def weighted_matrix(z, w, eps):
    """B (d, d), for tokens z (n, d) and their weights w (n,), which sum to 1."""
    # BEGIN SOLUTION
    d = z.shape[1]
    return torch.eye(d) + d / eps**2 * (z.T * w) @ z
    # END SOLUTION


# %% tags=["check"]
check.weighted_matrix(weighted_matrix)

# %% [markdown]
# Then derive the worth and implement it, for all tokens at once, without automatic differentiation and without a loop over tokens.


# %%
def worth(z, eps):
    """∂R_w/∂wᵢ at equal weights, (n,), for z (n, d)."""
    # BEGIN SOLUTION
    n, d = z.shape
    B = weighted_matrix(z, torch.full((n,), 1 / n), eps)
    return 0.5 * d / eps**2 * (z * torch.linalg.solve(B, z.T).T).sum(1)
    # END SOLUTION


# %% tags=["check"]
check.worth(worth)

# %% [markdown]
# Worth is not length. Here are ninety long tokens on one line, and ten short ones off it:

# %%
crowd = torch.outer(torch.randn(90), torch.tensor([3.0, 0.0, 0.0]))
strangers = torch.outer(torch.randn(10), torch.tensor([0.0, 1.0, 0.0]))
both = torch.cat([crowd, strangers])
value, length = torch.as_tensor(worth(both, 0.3)), both.square().sum(1)
print(f"mean squared length: crowd {length[:90].mean():.1f}, strangers {length[90:].mean():.1f}")
print(f"mean worth in nats:  crowd {value[:90].mean():.1f}, strangers {value[90:].mean():.1f}")
total = float(value.mean())
print(f"the mean worth, {total:.2f}, is half of the dimensions seen, {float(seen_dimensions(both, 0.3)):.2f}")
assert math.isclose(total, float(seen_dimensions(both, 0.3)) / 2)

# %% [markdown] tags=["hint"]
# $\mathrm d\log\det B = \operatorname{tr}(B^{-1}\,\mathrm dB)$, as in Exercise 1.C. What is $\mathrm dB$ if a single $w_i$ moves? And is there an $n$ in it?

# %% [markdown] tags=["hint"]
# $\partial B/\partial w_i = \frac{d}{\varepsilon^2} z_i z_i^\top$ has no $1/n$ in it, and $\operatorname{tr}(B^{-1}z_iz_i^\top) = z_i^\top B^{-1} z_i$.

# %% [markdown] tags=["hint"]
# In code $z_i$ is a row. `torch.linalg.solve(B, z.T)` gives all $B^{-1}z_i$ as columns; multiply entry by entry with `z` and sum.

# %% [markdown] tags=["solution"]
# $\frac{\partial R_w}{\partial w_i} = \frac{d}{2\varepsilon^2}\, z_i^\top B^{-1} z_i$. Up to the factor this is the *leverage* of a token: its length, measured where directions that many
# tokens share count less. The ½ stays this time, since each $w_i$ enters $B$ once and not, like $Z$, twice.
#
# The rate values what is rare, not what is large. A step that raises $R$ helps strangers first, and a step that compresses lets go of them first:
# keep this in mind for chapter 3. The last line is no accident: $\sum_i \frac1n\frac{d}{\varepsilon^2}z_i^\top B^{-1}z_i = \operatorname{tr}(B^{-1}\,cZZ^\top) = s(\varepsilon)$, Exercise 1.C.
