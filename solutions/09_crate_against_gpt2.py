# %% [markdown]
# # Exercises to chapter 9: CRATE against GPT-2
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before. All numbers are in double precision.
# A network has $L$ layers of $h$ neurons, neuron $j$ of layer $\ell$ the score $\rho_{\ell j}$, and (9.1)
#
# $$
# S_\ell=\frac{100}h\sum_{j=1}^{h}\rho_{\ell j},\qquad \bar S=\frac1L\sum_{\ell=1}^{L}S_\ell,\qquad V=\frac1L\sum_{\ell=1}^{L}\bigl(S_\ell-\bar S\bigr)^2 .
# $$

# %%
import matplotlib.pyplot as plt
import torch
from scipy.stats import t as student

from cratelab import plots
from cratelab.checks import crate_against_gpt2 as check
from cratelab.checks import drawn_curves

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 9.A: Two numbers for a network
#
# - **Goal:** sum up a network by mean and variance, and see two conventions turn a comparison round.
# - **Difficulty:** 1 of 5
# - **Time:** 15 minutes
#
# Where `defined` is false a neuron has no score, and whatever stands at its place in `scores` means nothing. With `drop` such neurons leave their layer's mean; without it they count as 0. With `last` all layers count; without it the last one is left out. Every layer has a neuron with a score.
# Before you run the last cell of this exercise: can dropping raise the lower of two networks above the higher?


# %%
def mean_and_variance(scores, defined, last, drop):
    """Mean and variance over layers, times 100 and 100²; scores and defined are (L, h), last and drop are bools."""
    # BEGIN SOLUTION
    alive = defined.sum(1) if drop else defined.shape[1]
    S = 100 * torch.where(defined, scores, 0).sum(1) / alive
    S = S if last else S[:-1]
    return S.mean(), S.var(correction=0)
    # END SOLUTION


# %% tags=["check"]
check.mean_and_variance(mean_and_variance)

# %% [markdown] tags=["hint"]
# Sum each layer's scores first, with 0 where there is none. Only the number by which you divide depends on `drop`.

# %% [markdown] tags=["hint"]
# The mean is one of *layers*: a layer of two live neurons weighs as much as one of two hundred. And what does torch's `var` divide by if it is not told?

# %% [markdown]
# Two made-up networks of three layers. In A every neuron has the score 0.5; in B three neurons in ten are silent, the others have 0.8, but in the last layer 0.4. Which of the two leads?

# %%
all_alive, some_alive = torch.ones(3, 10, dtype=torch.bool), torch.arange(10).expand(3, 10) < 7
A = torch.tensor([[0.5], [0.5], [0.5]]).expand(3, 10)
B = torch.tensor([[0.8], [0.8], [0.4]]).expand(3, 10)
for last in (True, False):
    for drop in (True, False):
        a, b = (mean_and_variance(x, d, last, drop) for x, d in ((A, all_alive), (B, some_alive)))
        cells = f"A {a[0]:.0f} (variance {a[1]:.0f}), B {b[0]:.0f} (variance {b[1]:.0f})"
        print(f"{'all layers' if last else 'without the last':17} {'dropped' if drop else 'as zero':8} {cells}")

# %% [markdown] tags=["solution"]
# The layers are all that there is of this network, not a sample of some larger set of layers, so (9.1) divides by $L$. With few layers that matters: at two, dividing by $L-1$ doubles the variance.
#
# The two conventions matter more. Dropping multiplies a layer's mean by $1/(1-u)$, $u$ being the share of its neurons without a score, and so it helps the network with more silent neurons. Of the four ways above to write one table three say that B leads, and one says A; and B's layers are either all alike or not at all.

# %% [markdown]
# ## Exercise 9.B: Seed by seed
#
# - **Goal:** give a difference of two models the interval that it deserves.
# - **Difficulty:** 2 of 5
# - **Time:** 10 minutes
#
# CRATE and GPT-2 were trained under the same $n$ seeds, and under one seed both saw the same text. `crate[s]` and `gpt2[s]` are their mean scores under seed $s$. Return both ends of the 95 % interval of CRATE's lead, (9.3). `student.ppf(q, df)` is the quantile of Student's $t$. None of scipy's `ttest_…` functions.


# %%
def paired_interval(crate, gpt2):
    """(low, high) for the mean of CRATE's score minus GPT-2's; both arguments are (n,), by seed."""
    # BEGIN SOLUTION
    d = crate - gpt2
    half = student.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean() - half, d.mean() + half
    # END SOLUTION


# %% tags=["check"]
check.paired_interval(paired_interval)

# %% [markdown] tags=["hint"]
# Form the differences first; after that the two models are forgotten, and there is one list of $n$ numbers.

# %% [markdown] tags=["hint"]
# A 95 % interval leaves 2.5 % out on *each* side. The standard deviation was estimated from the same $n$ numbers as their mean: how many of them are free?

# %% [markdown] tags=["solution"]
# Whatever a seed does to both models, easy excerpts, say, drops out of the differences; that is what pairing buys. What it costs is degrees of freedom, $n-1$ for $2n-2$, so it pays where seeds do something to both. Student's $t$ is the price for not knowing the spread. How high that is shows below: of ten thousand imagined experiments
# in which CRATE leads by 3 points, how many intervals hold 3? With 1.96 and three seeds not 95 % but four in five.

# %% tags=["solution"]
lead, trials = 3, 10_000
for n in (3, 5, 20):
    d = lead + 2 * torch.randn(trials, n)
    error = d.std(1) / n**0.5
    shares = [((d.mean(1) - lead).abs() <= q * error).double().mean() for q in (student.ppf(0.975, n - 1), 1.96)]
    print(f"{n:2} seeds: t holds the truth in {100 * shares[0]:.0f} %, 1.96 in {100 * shares[1]:.0f} %")

# %% [markdown]
# ## Exercise 9.C: What a bootstrap measures
#
# - **Goal:** resample neurons within their layers, and know in advance what will come out.
# - **Difficulty:** 3 of 5
# - **Time:** 15 minutes
#
# A resample draws $h$ neurons of each layer, with replacement, each layer on its own. `picks[b, l]` are the numbers, within layer $l$, of the neurons that resample $b$ draws there. Return the standard deviation of the network's mean $\frac1L\sum_\ell\frac1h\sum_j\rho_{\ell j}$ over the $B$ resamples (without the factor 100).
# The check draws nothing: it uses small networks and *all* the resamples that there are. So divide by $B$, not by $B-1$.


# %%
def bootstrap_error(scores, picks):
    """Standard deviation of the resampled means; scores are (L, h), picks (B, L, h) integers below h."""
    # BEGIN SOLUTION
    layer = torch.arange(len(scores))[:, None]
    drawn = scores[layer, picks]  # (B, L, h)
    return drawn.mean((1, 2)).std(correction=0)
    # END SOLUTION


# %% tags=["check"]
check.bootstrap_error(bootstrap_error)

# %% [markdown] tags=["hint"]
# `scores[rows, columns]` with two tensors of integers takes one entry for each pair, and their shapes are broadcast. Which shape do the rows need beside columns of `(B, L, h)`?

# %% [markdown] tags=["hint"]
# One resample is one imagined network, and has one mean. The bootstrap asks how these means scatter; their scatter *is* the standard error, and nothing has to be divided any more.

# %% [markdown] tags=["solution"]
# Because all resamples are there, one need not draw any. A draw of layer $\ell$ has that layer's variance $v_\ell$ (divided by $h$, not $h-1$), a mean of $h$ draws $v_\ell/h$, and layers are drawn independently, so the bootstrap gives
#
# $$\sqrt{\frac1{L^2}\sum_\ell\frac{v_\ell}h},$$
#
# which is what the check compares with. A random bootstrap gets this and some noise. Two things follow. Differences *between* layers do not enter, since each layer is always represented by $h$ neurons; whoever draws from all layers together gets more. And the error falls with $1/\sqrt{Lh}$: it looks excellent for any network of a decent width.
# Of another training nothing stands in the formula, for nothing of it stands in the data.

# %% tags=["solution"]
for h in (16, 256):
    scores = 0.5 + 0.2 * torch.randn(2, h) + torch.tensor([[0.2], [-0.2]])
    random = bootstrap_error(scores, torch.randint(h, (5_000, 2, h)))
    closed = (scores.var(1, correction=0).mean() / (2 * h)).sqrt()
    print(f"{h:3} neurons a layer: bootstrap {100 * random:.1f} points, closed form {100 * closed:.1f}")

# %% [markdown]
# ## Exercise 9.D: What the neurons cannot tell
#
# - **Goal:** separate the luck of training from the luck of the neurons.
# - **Difficulty:** 4 of 5
# - **Time:** 20 minutes
#
# Now $n$ networks of one layer were trained under different seeds, and `scores[s, j]` is the score of neuron $j$ under seed $s$. By (9.2) with $L=1$ a network's mean $\bar S$ has
#
# $$\operatorname{Var}(\bar S)=\sigma^2_{\text{train}}+\frac{\sigma^2_{\text{neuron}}}h .$$
#
# Estimate $\sigma^2_{\text{train}}$ without bias: replace both other variances by unbiased estimates and solve. That of the neurons is the mean over networks of the variance within each.


# %%
def training_variance(scores):
    """Unbiased estimate of the variance between trainings; scores are (n, h). It can be negative."""
    # BEGIN SOLUTION
    between = scores.mean(1).var()
    within = scores.var(1).mean()
    return between - within / scores.shape[1]
    # END SOLUTION


# %% tags=["check"]
check.training_variance(training_variance)

# %% [markdown] tags=["hint"]
# The left side: how do the $n$ means scatter? Unbiased means $n-1$ there, and $h-1$ within a network.

# %% [markdown] tags=["hint"]
# If training were no luck at all, the means would still scatter, by $\sigma^2_{\text{neuron}}/h$. So that much has to go.

# %% [markdown] tags=["solution"]
# The check finds the same number with no variance at all: two neurons of one network share its luck, so their product is larger, on average by $\sigma^2_{\text{train}}$, than that of two neurons of different networks. The estimate can be negative, when the means happen to scatter less than the neurons alone would have them; cutting it off at 0 would make it biased.
#
# Below is why it matters. In every imagined experiment a network's expected score scatters by 2 points with training, and its neurons by 20 points. The bootstrap of *one* network promises 95 %. The more neurons, the narrower its interval, and the less often it holds the truth; the interval over three seeds keeps its promise at every width. Neurons are cheap and say ever more exactly how good *this* network is.

# %% tags=["solution"]
widths, truth, trials = [16, 64, 256, 1024], 0.5, 1_000
held = {"bootstrap of one network": [], "three seeds": []}
for h in widths:
    scores = truth + 0.02 * torch.randn(trials, 3, 1) + 0.2 * torch.randn(trials, 3, h)
    means = scores.mean(2)
    halves = [1.96 * scores[:, 0].std(1, correction=0) / h**0.5, student.ppf(0.975, 2) * means.std(1) / 3**0.5]
    for name, middle, half in zip(held, [means[:, 0], means.mean(1)], halves, strict=True):
        held[name].append(100 * float(((middle - truth).abs() <= half).double().mean()))
fig, ax = plt.subplots(figsize=(5.4, 3))
for (name, shares), color in zip(held.items(), plots.PALETTE[2:4], strict=True):
    ax.plot(widths, shares, "o-", color=color, label=name)
ax.axhline(95, color="0.6", ls="--", lw=0.8)
ax.set(xscale="log", xlabel="neurons", ylabel="intervals with the truth, %", ylim=(0, 105), xticks=widths)
ax.set_xticklabels(widths)
ax.minorticks_off()
ax.legend()
plt.show()
estimates = torch.stack([training_variance(network) for network in scores])
print(f"training: mean of the estimates {100 * estimates.mean().clamp(min=0).sqrt():.1f} points, put in 2.0")

# %% [markdown]
# ## Exercise 9.E: Draw before you plot
#
# - **Goal:** say what a curve will look like before it is measured, and see where you were wrong.
# - **Difficulty:** 4 of 5
# - **Time:** 20 minutes
#
# Long explanations should score higher than short ones. How much higher? Take a CRATE that the package carries, with two layers of 256 neurons, which has read TinyWorld, and give each neuron chapter 8's table of words, of which only the $k$ words with the highest means are kept; at all other words the simulation says 0. Draw the mean score over neurons, times 100, for $k=1,2,4,8,16,32$, five times:
#
# - `trained`: under top-and-random,
# - `random-only`: the same explanations, on random excerpts alone,
# - `untrained`: a CRATE with random weights that has read nothing, with its own tables, under top-and-random,
# - `another`: the trained network, each neuron simulated by the $k$ words of *another* neuron of its layer, under top-and-random,
# - `within`: the score within tokens (9.5) of the trained network and its own tables, under top-and-random.
#
# Seven features are graded, not the numbers: the *direction* of the first three curves, their *bend* (which doublings of $k$ bring more, the first or the last ones?), the *ceiling* where `trained` ends, the *order* of `trained` and `random-only`, what the *control* `untrained` reaches beside `trained`, what `another` has by *chance*, and what `within` finds of *context*. A curve that passes within 8 points of 0 everywhere counts as 0.
# Draw all five before you ask. The check then says how many features are right, and below it both drawings stand in one figure.


# %%
def curves():
    """{"trained": six numbers, for 1, 2, 4, 8, 16 and 32 words, "random-only": …, "untrained": …, …}"""
    # BEGIN SOLUTION
    return {
        "trained": [30, 40, 50, 57, 62, 65],
        "random-only": [15, 22, 28, 33, 37, 40],
        "untrained": [20, 28, 36, 43, 48, 51],
        "another": [0, 0, 0, 0, 0, 0],
        "within": [0, 0, 0, 0, 0, 0],
    }
    # END SOLUTION


# %% tags=["check"]
drawn_curves.curves(curves)

# %% [markdown] tags=["hint"]
# Two of the five need no idea of the network at all. What does a table of words say of two occurrences of one word, and what is left of it when the mean over these occurrences has been taken away? And which of chapter 8's controls was near 0, whatever the protocol?

# %% [markdown] tags=["hint"]
# The words come by falling strength, the strongest first. Which of them moves a correlation most, when deviations enter squared? Where do the words of the table stand, in the strong excerpts of $V$ or in the random ones? And can anything that says one number a word come near 100?

# %% [markdown] tags=["hint"]
# `trained` and `untrained` rise steeply and then flatten; `trained` ends at chapter 8's score of whole tables, near 65, and `untrained` at seven tenths of that or so. `random-only` lies below `trained` for every $k$. `another` and `within` are 0 throughout.

# %%
drawn, found = curves(), drawn_curves.measured()
fig, ax = plt.subplots(figsize=(6.4, 3.6))
for i, name in enumerate(drawn_curves.CURVES):
    ax.plot(drawn_curves.N_WORDS, found[name], "o-", color=plots.PALETTE[i], label=name)
    ax.plot(drawn_curves.N_WORDS, drawn[name], "--", color=plots.PALETTE[i], lw=1)
ax.plot([], [], "--", color="0.4", lw=1, label="drawn by you")
ax.set(xscale="log", xlabel="words kept of each table", ylabel="mean score × 100", xticks=drawn_curves.N_WORDS)
ax.set_xticklabels(drawn_curves.N_WORDS)
ax.minorticks_off()
ax.legend(bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown] tags=["solution"]
# Half of what a whole table scores comes from a single word, and eight words have most of it: a sentence with room for "any of eight words" loses little. That is a reason why short explanations do well with this score. It is none for calling them complete, since the squares in a correlation see the strong places before all else.
#
# The untrained network starts lower and catches up: with one word it has half of the trained score, with all of them seven tenths. Its neurons are random functions of the token, so no few words stand out; trained neurons are concentrated on fewer. A *short* table therefore tells a network that has learned from one that has not better than a long one does. That could not be known from the published scores, which have one length each.
#
# And no number of words gets `within` off the ground. It is zero by construction, not by failure of these neurons: exercise 8.F has a sentence on one of them that reads what came before, and it scores 0.7 there.

# %% tags=["solution"]
others = drawn_curves.measured("gpt2")
print("words kept" + "".join(f"{n:>5}" for n in drawn_curves.N_WORDS))
for label, values in (("CRATE", found["trained"]), ("GPT-2", others["trained"]), ("untrained", found["untrained"])):
    print(f"{label:10}" + "".join(f"{value:5.0f}" for value in values))
short, long = (found["untrained"][k] / found["trained"][k] for k in (0, -1))
assert short < 0.6 < long - 0.05
print(f"untrained / trained: {short:.1f} with one word, {long:.1f} with {drawn_curves.N_WORDS[-1]}")
