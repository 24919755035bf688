# %% [markdown]
# # Exercises to chapter 11: what does pushing a neuron do?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before. All numbers are in double precision, and all divergences in nats.
# $p$ are the predictions of the model as it is, $p'$ those of the steered model, and $T$ is a set of words, the targets. Means are over positions:
#
# $$
# L=\mathbb E\bigl[\log p'(T)-\log p(T)\bigr],\qquad K=\mathbb E\;\mathrm{KL}\bigl(p(\cdot|\bar T)\,\|\,p'(\cdot|\bar T)\bigr).
# $$

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr

from cratelab import plots, steering
from cratelab.checks import experiment as experiment_check
from cratelab.checks import steering as check
from cratelab.corpora import tinyworld
from cratelab.experiments.reference_models import load_reference
from cratelab.interpret.evaluation import collect_for_protocols, evaluate
from cratelab.interpret.explainers import TokenExplainer
from cratelab.intervals import interval
from cratelab.steering import neuron_maxima

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 11.A: How far a set is lifted
#
# - **Goal:** compute the lift of a set of words from logits, without underflow.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# $p(T)$ is the total probability of the set. Compute $L$ from the logits before and after a push. Targets may be so unlikely that their probability is 0 in floating point; their logarithm is not $-\infty$.


# %%
def lift(logits, steered, targets):
    """L in nats, a number; logits before and after (n, v), targets (v,) bool."""
    # BEGIN SOLUTION
    before, after = (x.log_softmax(1)[:, targets].logsumexp(1) for x in (logits, steered))
    return (after - before).mean()
    # END SOLUTION


# %% tags=["check"]
check.lift(lift)

# %% [markdown] tags=["hint"]
# The probability of a set is a sum, so its logarithm is $\log\sum_{x\in T}e^{\log p(x)}$. Which function of torch computes that without ever leaving the logarithms?

# %% [markdown] tags=["hint"]
# `log_softmax` first, over the whole vocabulary, then the columns of $T$. What would be missing if you took the logits themselves?

# %% [markdown] tags=["solution"]
# Two orders of sum and logarithm are easy to confuse. The mean of $\log p$ over the words of $T$ gives each word the same weight, however unlikely it is; the lift asks how often *any* of them is said. The cell below raises one hopeless target by a factor of a hundred. The mean of the
# logarithms celebrates, the lift hardly moves, and the model says targets about as seldom as before. (To divide by the number of targets, on the other hand, is harmless: it cancels in the difference.)
#
# The mean over positions comes last. The logarithm of the mean of $p(T)$ would be decided by the few positions where targets are likely anyway. And an unnormalised `logsumexp` of the steered logits would call it a lift if a constant were added to all logits, which changes nothing.

# %% tags=["solution"]
p = torch.tensor([[0.2, 0.0001, 0.5, 0.2999]])
T = torch.tensor([True, True, False, False])
steered = p.log() + torch.tensor([0, 100, 1, 1]).clamp(min=1).log()
mean_of_logs = (steered.log_softmax(1) - p.log())[:, T].mean()
print(f"mean of the logarithms {float(mean_of_logs):.2f}, lift {float(lift(p.log(), steered, T)):.2f} nats")

# %% [markdown]
# ## Exercise 11.B: What else moves
#
# - **Goal:** take what was ordered out of a divergence, and measure the rest.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# Compute $K$, the divergence of what the model says when it says no target, before and after a push. At least two words are no targets.


# %%
def off_target(logits, steered, targets):
    """K in nats, a number; logits before and after (n, v), targets (v,) bool."""
    # BEGIN SOLUTION
    p, q = (x[:, ~targets].log_softmax(1) for x in (logits, steered))
    return (p.exp() * (p - q)).sum(1).mean()
    # END SOLUTION


# %% tags=["check"]
check.off_target(off_target)

# %% [markdown] tags=["hint"]
# $p(x|\bar T)=p(x)/p(\bar T)$ sums to one over the words outside $T$. What does a softmax over only some of the logits give?

# %% [markdown] tags=["hint"]
# Leave the columns of $T$ out. If you put $-\infty$ there instead, you will meet $0\cdot(\infty-\infty)$. The expectation in $\mathrm{KL}(p\,\|\,p')$ is under $p$.

# %% [markdown] tags=["solution"]
# The softmax of some of the logits *is* the conditional distribution: the factor $1/p(\bar T)$ is the same for all and goes into the normalisation. That makes the right answer the shortest one.
#
# Without renormalising, the sum over $\bar T$ of $p\log(p/p')$ holds $p(\bar T)\log\bigl(p(\bar T)/p'(\bar T)\bigr)$ as well, which is the lift again, under another name. A push that only trebles the targets, and takes from all others in proportion, does no damage; below, $K$ says so and two plausible variants do not. The
# reversed divergence weighs words by what the steered model says. It charges much for words that it newly says, and next to nothing for those that it has given up.

# %% tags=["solution"]
p = torch.tensor([[0.05, 0.15, 0.4, 0.2, 0.1, 0.1]])
T = torch.arange(6) < 2
tripled = (p * torch.where(T, 3, 1)).log().log_softmax(1)
terms = p * (p.log() - tripled)
print(f"divergence of everything {float(terms.sum()):.3f}, not renormalised {float(terms[:, ~T].sum()):.3f}")
print(f"off target {abs(float(off_target(p.log(), tripled, T))):.3f}")

# %% [markdown]
# ## Exercise 11.C: To steer by nothing
#
# - **Goal:** splice an auto-encoder into a layer so that what it cannot copy is not lost.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# An auto-encoder copies the neurons $x$ of a layer: $f=\max(0,xA+c)$ and $\mathrm{Dec}(f)=fW+b$. To steer with it one sets one feature $f_j$ to a value, at all tokens. Return, stacked, what the network goes on with in the place of $x$: first the copy with the edit, $\mathrm{Dec}(f')$; then the same with the
# **error term**: what the copy had lost is added back, so that an edit that changes no feature changes nothing.


# %%
def spliced(x, A, c, W, b, feature, value):
    """(2, n, h): without and with error term; x (n, h), A (h, m), c (m,), W (m, h), b (h,), feature an integer."""
    # BEGIN SOLUTION
    code = (x @ A + c).clamp(min=0)
    edited = code.clone()
    edited[:, feature] = value
    copy, steered = code @ W + b, edited @ W + b
    return torch.stack([steered, steered + (x - copy)])
    # END SOLUTION


# %% tags=["check"]
check.spliced(spliced)

# %% [markdown] tags=["hint"]
# The error is a property of the copy and not of the edit: what does the auto-encoder make of $x$ if nobody touches $f$?

# %% [markdown] tags=["hint"]
# After `edited = code` there is one tensor with two names. And what becomes of $b$ in $\mathrm{Dec}(f')-\mathrm{Dec}(f)$?

# %% [markdown] tags=["solution"]
# $\mathrm{Dec}(f')+x-\mathrm{Dec}(f)=x+(f'_j-f_j)w_j$: the bias has cancelled and so has every other feature. With the error term nothing remains of the auto-encoder but the direction $w_j$, and a number that says how far to go. Without it the network goes on with a copy.
#
# The most instructive slip is the error of the *edited* code. $\mathrm{Dec}(f')+x-\mathrm{Dec}(f')$ is $x$, whatever was edited: the splice is flawless and steering has no effect at all. `edited = code` without `clone` does just that, and a test that only steers by nothing passes. So test both: that nothing does nothing, and that something does something.
#
# Below, a decoder is fitted by least squares to a random code, and its copy is not perfect. Feature 0 never fires, so to set it to 0 is to steer by nothing. What do random predictions read from the layer lose?

# %% tags=["solution"]
x, E = torch.randn(400, 30) / 3, torch.randn(50, 30)
A, c = torch.randn(30, 40), torch.zeros(40)
c[0] = -100
code = (x @ A + c).clamp(min=0)
solution = torch.linalg.pinv(torch.cat([code, torch.ones(400, 1)], 1)) @ x
W, b = solution[:-1], solution[-1]
p = (x @ E.T).log_softmax(1)
for name, z in zip(["without error term", "with"], spliced(x, A, c, W, b, 0, 0.0), strict=True):
    fee = (p.exp() * (p - (z @ E.T).log_softmax(1))).sum(1).mean()
    print(f"{name:18}: {abs(float(fee)):.1f} nats for steering by nothing")

# %% [markdown]
# ## Exercise 11.D: The cost at equal lift
#
# - **Goal:** compare neurons where they reach the same, and account for those that never do.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Of each of $m$ neurons the lift and the cost are known with nothing steered (the first row) and at rising strengths (the others). Between two rows both are linear. Return the cost where each neuron *first* reaches the lift `level`: that of the first row if it is reached there already, which an auto-encoder without
# error term may do, and infinity if it is reached in no row. Lift need not rise all the way.
#
# Four neurons as an example, with four rows each and the level 1:
#
# | lift, row by row | cost, row by row | the level is first reached | its cost |
# |---|---|---|---|
# | 0, 0.5, 1.5, 2 | 0, 0.1, 0.5, 0.9 | between the second row and the third, half-way | $0.1+\tfrac12\cdot0.4=0.3$ |
# | 0, 0.8, 0.3, 1.7 | 0, 0.1, 0.2, 0.9 | between the last two, half-way: what was before the dip does not count | $0.2+\tfrac12\cdot0.7=0.55$ |
# | 1.2, 0.4, 0.6, 1.1 | 0.05, 0.1, 0.3, 0.6 | in the first row | $0.05$ |
# | 0, 0.6, 0.4, 0.9 | 0, 0.1, 0.4, 0.8 | never | $\infty$ |


# %%
def cost_at(lift, cost, level):
    """(m,) cost where each neuron first reaches the lift `level`; lift and cost are (s, m)."""
    # BEGIN SOLUTION
    result = torch.full(lift.shape[1:], torch.inf)
    for j, (own, price) in enumerate(zip(lift.T, cost.T, strict=True)):
        reached = (own >= level).nonzero()
        if len(reached) == 0:
            continue
        i = int(reached[0, 0])
        if i == 0:
            result[j] = price[0]
        else:
            share = (level - own[i - 1]) / (own[i] - own[i - 1])
            result[j] = price[i - 1] + share * (price[i] - price[i - 1])
    return result
    # END SOLUTION


# %% tags=["check"]
check.cost_at(cost_at)

# %%
lift_rows = [[0, 0.5, 1.5, 2], [0, 0.8, 0.3, 1.7], [1.2, 0.4, 0.6, 1.1], [0, 0.6, 0.4, 0.9]]
cost_rows = [[0, 0.1, 0.5, 0.9], [0, 0.1, 0.2, 0.9], [0.05, 0.1, 0.3, 0.6], [0, 0.1, 0.4, 0.8]]
of_example = torch.as_tensor(cost_at(torch.tensor(lift_rows).T, torch.tensor(cost_rows).T, 1.0))
torch.testing.assert_close(of_example, torch.tensor([0.3, 0.55, 0.05, torch.inf]), check_dtype=False)
print("the example's four costs:", *(f"{float(cost):.2f}" for cost in of_example))

# %% [markdown] tags=["hint"]
# For one neuron: let $i$ be the first row with a lift of at least `level`. Which share of the way from row $i-1$ to row $i$ is needed? The same share of the way is needed of the cost.

# %% [markdown] tags=["hint"]
# Two cases have no way from one row to the next. Which row does `argmax` name if all are false? Which row is row $i-1$ if $i$ is 0?

# %% [markdown] tags=["solution"]
# A loop over neurons is easy to read and fast enough for a hundred; the library does the same for all at once with `gather`. `argmax` of a row of falses is 0, so a neuron that never arrives gets the price of not being steered at all, which is nothing: the worst neurons come out as the cheapest. And row $-1$ is the last one.
#
# Why infinity? To extrapolate is to promise what the last layer's normalisation forbids, since the lift saturates. To leave such neurons out is the bias of chapter 8 again: those that remain are the better ones. Below, strong neurons are cheap and weak ones dear. As the level rises, weak ones drop out, and the median of those that are left is flattered. The median
# over all takes infinity along, as long as fewer than half are infinite; beyond that it says, rightly, that the typical neuron cannot do it.

# %% tags=["solution"]
strength = torch.tensor([0, 0.5, 1, 2, 4, 8])[:, None]
reach = torch.linspace(0.5, 6, 101)
lifts = reach * (1 - torch.exp(-strength))
costs = lifts**2 / reach**2
for level in (1.0, 2.0, 4.0):
    each = cost_at(lifts, costs, level)
    kept = each[each.isfinite()]
    print(
        f"lift {level:.0f}: median of all {float(each.median()):.2f}, of the {len(kept)} that reach it {kept.median():.2f}"
    )

# %% [markdown]
# ## Exercise 11.E: Draw it before you plot it
#
# - **Goal:** say what a curve must look like, from the formulas, before anything is measured.
# - **Difficulty:** 3 of 5
# - **Time:** 25 to 30 minutes
#
# A neuron in the second layer of a toy is pushed: $s$ times its own maximum is added to its activation, at all tokens, with $s$ from $-64$ to 64. The targets are the ten words that its atom raises most. How do the lift $L$ and the divergence $K$ go with $s$, in CRATE and in GPT-2? Of both take the median over thirty neurons.
# Before the push $-\log p(T)$ is between 10 and 11.5 nats, for the median neuron: these ten words are rarely said.
#
# Draw four curves, with pencil and paper first, and then as numbers, one for each strength, typed in or by a formula. Near no push give as many digits as it takes: what is small there is not 0. Values are not asked for; what is, are seven features. Are the curves what they must be if nothing is added (`rest`)? Which signs have they to the left and to the right (`sign`)? What becomes of each if a small push is halved (`small`), or turned
# round (`mirror`)? What does the push of 64 add to that of 8 (`strong`: little, less than in proportion, or more)? Is there a height that no curve of the lift can pass (`ceiling`)? Which model does the push of 1 move further (`model`)?


# %%
def drawn(strengths):
    """{"lift, CRATE": [...], "lift, GPT-2": [...], "off target, CRATE": [...], "off target, GPT-2": [...]}

    strengths is (-64, -8, -1, -0.1, -0.05, 0, 0.05, 0.1, 1, 8, 64), and each curve has as many numbers.
    """
    # BEGIN SOLUTION
    s = np.array(strengths)
    return {
        "lift, CRATE": 10 * np.tanh(0.3 * s),
        "lift, GPT-2": 10 * np.tanh(0.2 * s),
        "off target, CRATE": 7 * s**2 / (s**2 + 100),
        "off target, GPT-2": 7 * s**2 / (s**2 + 200),
    }
    # END SOLUTION


# %% tags=["check"]
check.drawn(drawn)

# %% tags=["nbval-ignore-output"]
measured, _ = check.push_curves()
mine, ticks = drawn(check.STRENGTHS), [-64, -8, -1, -0.1, 0, 0.1, 1, 8, 64]
fig, axs = plt.subplots(1, 2, figsize=(9.6, 3.2))
for ax, what in zip(axs, ["lift", "off target"], strict=True):
    for label, colour in [("CRATE", plots.CRATE), ("GPT-2", plots.GPT2)]:
        key = f"{what}, {label}"
        ax.plot(check.STRENGTHS, measured[key], "o-", color=colour, label=f"{label}, measured")
        ax.plot(check.STRENGTHS, mine[key], "--", color=colour, alpha=0.6, label=f"{label}, drawn")
    ax.set_xscale("symlog", linthresh=0.05)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlabel="strength, multiples of the maximum", ylabel=f"{what}, nats")
axs[0].legend(fontsize=8)
plt.show()

# %% [markdown] tags=["hint"]
# Near no push a smooth curve is a straight line, unless it has a minimum there. Which of the two curves has its minimum at 0, whatever the model?

# %% [markdown] tags=["hint"]
# Far out: the last LayerNorm divides $z+\delta d$ by its standard deviation. What is left of it when $\delta$ is so large that $z$ no longer counts, and what does a further factor of eight change? And how large can $p'(T)$ become?

# %% [markdown] tags=["hint"]
# In GPT-2 the second layer adds what its neurons say to a stream that holds all that came before. In CRATE ISTA's code times the dictionary *is* the new state. In which of them is one atom more a larger part of what there is?

# %% [markdown] tags=["solution"]
# None of the seven asks for a measurement. At rest nothing has changed. For a small push $L$ is linear and $K$ quadratic, which is why a little steering looks free: halve the push, and you lose half of the lift and three quarters of the damage. (On logarithmic axes, a slope of 1 and one of 2.) Far out LayerNorm ends it, $z+\delta d\to\delta d$ and the length of that is taken away again, so
# from 8 to 64 times the maximum the lift hardly moves. It comes near its ceiling, $-\log p(T)$, because by then the atom's favourite words are nearly all that is said.
#
# The divergence is still on its way at 64, slower than in proportion. It has a ceiling as well, where the atom alone speaks, but it depends on the words that are no targets, and the more unlikely ones get there late. What nobody was asked is worth a look: the lift down is *not* the mirror image of the lift up once pushes are strong. The same atom,
# turned round, makes other words likely, and how far it takes the targets down is a matter of these. A formula with $\tanh$ is symmetric and passes, since only the small pushes are bound to be so.

# %% tags=["solution"]
measured, _ = check.push_curves()
up, down = (abs(measured["lift, CRATE"][check.STRENGTHS.index(s)]) for s in (64, -64))
print("strong pushes up lift more than pushes down lower, by more than a third:", bool(up > down * 4 / 3))

# %% [markdown]
# ## Exercise 11.F: An experiment of your own: does a good explanation tell how to steer?
#
# - **Goal:** put a claim about neurons to a test that it could fail.
# - **Difficulty:** 5 of 5
# - **Time:** 3 to 4 hours
#
# Chapters 8 to 10 score neurons by how well an explanation foretells when they fire; chapter 11 sets them and watches what the network says. One would hope that the two go together: a neuron whose explanation scores high should, when it is set, raise the words that its explanation names. Does it? Or take
# another question about part IV, such as: does a neuron keep its score on another text? Are neurons that score high under one protocol the ones that score high under another? Does it cost more to steer at some places of a text than at others? Are two neurons pushed together cheaper than one? Do the
# neurons that a concept names matter for the loss where that concept holds? Any will do whose answer you do not know yet.
#
# Write `experiment(seed)`. It returns a dictionary of numbers: what you measure, under names of your choice, and under `"control"` the same measurement where the effect cannot be there. It takes a few seconds at most, and every random number in it
# comes from `seed`. `load_reference("crate", "toy", seed)` has trained models for seeds 0 to 4, and `"gpt2"` too. The check looks only at this. What you find is judged by a reader:
#
# | | 0 | 1 | 2 |
# |---|---|---|---|
# | question | none, or one that no result could answer | answerable, but the answer is clear beforehand | one sentence, and a prediction written down before measuring |
# | control | none | present, but differs in more than one way | differs in nothing but the effect |
# | numbers | one run | several seeds, mean only | several trained models and texts, each with a spread; none left out, and it is said what varies |
# | figure or table | cannot be read alone | axes and units are named | shows control and effect so that one sees the answer |
# | conclusion | says more than was measured | says what was measured | says also what would have changed it, and what it does not show |


# %%
def experiment(seed):
    """{what you measure: number, …, "control": number}"""
    # BEGIN SOLUTION
    scores, lifts = scores_and_lifts("crate", seed)
    others = np.random.default_rng(seed).permutation(scores)
    return {
        "correlation": spearmanr(scores, lifts).statistic,
        "control": spearmanr(others, lifts).statistic,
    }


def scores_and_lifts(name, seed, n_tokens=20_000, layer=1):
    """For 100 live neurons: the score of the explanation, and the lift of the ten words it names, less the controls'."""
    model = load_reference(name, "toy", seed % 5).requires_grad_(False)
    corpus = tinyworld.generate(n_tokens, seed=100 + seed, context=128).corpus()
    v = model.config.vocab_size
    records = collect_for_protocols(model, corpus, ["top-and-random"], seed=seed)
    (found,) = evaluate(records, {"token": TokenExplainer()})
    maxima = neuron_maxima(model, corpus)[layer]
    neurons = steering.draw_live(maxima, 100, seed)
    named = found.explanations.named_tokens(layer, neurons, 10, v)
    controls = steering.control_tokens(named, steering.token_counts(corpus, v), seed=seed)
    spans = [corpus.document_span(i) for i in range(corpus.n_documents)]
    starts = [start for start, stop in spans if stop - start >= 64][:4]
    contexts = torch.from_numpy(np.stack([corpus[start : start + 64] for start in starts]).astype("int64"))
    at_maximum = steering.frontier(model, contexts, layer, neurons, maxima[neurons], named, controls, strengths=[1.0])
    scores = found.scores.correlation[layer, neurons].nan_to_num(0)
    return scores.numpy(), (at_maximum.lift - at_maximum.control_lift)[1].numpy()
    # END SOLUTION


# %% tags=["check"]
experiment_check.conduct(experiment)

# %% [markdown] tags=["hint"]
# You need two numbers for each neuron, one from chapter 8 and one from chapter 11, and then something that says whether they go together without caring about their units. The control gives each neuron the first number of another neuron.

# %% [markdown] tags=["hint"]
# `evaluate(collect_for_protocols(model, corpus, ["top-and-random"], seed=seed), {"token": TokenExplainer()})` has scores and explanations of all neurons. `named_tokens` turns explanations into words, `control_tokens` draws words that are as frequent, and `frontier(…, strengths=[1.0])` sets each neuron to its
# maximum and measures both. Leave the words' own frequency out: take the lift of the controls off.

# %% [markdown] tags=["solution"]
# One answer among many. **Question:** among the neurons of one layer, do those with the better score raise the words of their explanation more? **Prediction:** yes in CRATE, where one column reads and writes, so that a neuron that reads some words purely should write them purely; no in GPT-2, where reading and writing are two matrices.
# **Effect:** the rank correlation, over a hundred neurons of the second layer, of the score (top-and-random, token explainer) and the lift of the ten named words, less that of equally frequent ones, with the neuron set to its maximum. **Control:** the same lifts with the scores of other neurons, two hundred times. **What varies:** five texts that the
# models have not seen, each with its own draw of neurons, and five models of each kind.

# %% tags=["solution"]
fig, axs = plt.subplots(1, 2, figsize=(8.4, 3.2))
rows = {}
for place, (name, colour) in enumerate([("crate", plots.CRATE), ("gpt2", plots.GPT2)]):
    label = {"crate": "CRATE", "gpt2": "GPT-2"}[name]
    rows[label] = []
    for seed in range(5):
        scores, lifts = scores_and_lifts(name, seed)
        own, draw = spearmanr(scores, lifts).statistic, np.random.default_rng(seed)
        shuffled = [spearmanr(draw.permutation(scores), lifts).statistic for _ in range(200)]
        rows[label].append((float(own), np.median(lifts)))
        if seed == 0:
            axs[0].plot(scores, lifts, ".", color=colour, ms=5, alpha=0.7, label=label)
        at = place + 0.14 * (seed - 2)
        axs[1].plot([at, at], np.quantile(shuffled, [0.025, 0.975]), color="0.75", lw=4, solid_capstyle="butt")
        axs[1].plot(at, own, "D", color=colour, ms=5)
axs[0].axhline(0, color="black", lw=0.8)
axs[0].set(
    xlabel="score of the explanation", ylabel="net lift of its words, nats", title="the neurons of the first run"
)
axs[0].legend()
axs[1].axhline(0, color="black", lw=0.8)
axs[1].set(
    xticks=[0, 1], xticklabels=["CRATE", "GPT-2"], ylabel="rank correlation", title="five runs; grey: shuffled, 95 %"
)
plt.show()
for name, found in rows.items():
    print(f"{name:5} rank correlation      :", "  ".join(f"{row[0]:5.2f}" for row in found))
    print(f"{name:5} median net lift, nats :", "  ".join(f"{row[1]:5.2f}" for row in found))
    correlations = [row[0] for row in found]
    print(f"{name:5} mean, 95 % interval   : {np.mean(correlations):5.2f} ± {interval(correlations):.2f}")

# %% [markdown] tags=["solution"]
# Each column of the table is a run, with a model and a text of its own. **The prediction holds for CRATE, but only just.** Over the five runs the interval of
# its mean correlation leaves out zero by a hair. GPT-2's does not, and neither can it be told from CRATE's. What is plain is the level. CRATE's neurons lift the words that
# their explanations name, by more than half a nat in the middle, and GPT-2's hardly do, as the chapter found. So the tie between reading and writing is a property of the architecture, of nearly all neurons alike, and only a little more one of those that are well explained. Who wants a neuron to steer with gains little by
# choosing a high score. (With the CRATE of an earlier edition, trained at a rate too small for it, we found no correlation in any run. Two models differ in more than their names.)
#
# **What would have changed the conclusion:** diamonds inside the bars for CRATE, in most runs. **What this does not show:** that there is no connection in GPT-2. With a hundred neurons a run, a correlation below 0.2 cannot be told from none. The scores of one layer are alike, most between 0.5 and 0.9, and over a wider range, or between layers, more might be
# seen. The token explainer names words that the neuron fires *on*; an explainer that names what comes *after* might score differently and steer better. And these are two layers, one world, five models.
