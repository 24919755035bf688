# %% [markdown]
# # Exercises to chapter 10: what does post-hoc sparsity cost?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before. All numbers are in double precision, and tokens are rows. A sparse auto-encoder rewrites the activity $x\in\mathbb R^h$ of a layer with $m$ features:
#
# $$
# f=\operatorname{ReLU}\bigl((x-b_{\text{dec}})\,W_{\text{enc}}+b_{\text{enc}}\bigr)\in\mathbb R^m,
# \qquad
# \hat x=f\,W_{\text{dec}}+b_{\text{dec}} .
# $$

# %%
import matplotlib.pyplot as plt
import torch

from cratelab import plots
from cratelab.checks import sparse_auto_encoders as check

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 10.A: One feature less
#
# - **Goal:** know what each of the four parameters does, by switching a feature off.
# - **Difficulty:** 1 of 5
# - **Time:** 10 minutes
#
# Encode, set feature `j` to 0 at all tokens, and decode. This is what goes back into the model when one asks what a feature is for.


# %%
def without_feature(x, W_enc, b_enc, W_dec, b_dec, j):
    """(n, h) reconstruction without feature j; x (n, h), W_enc (h, m), b_enc (m,), W_dec (m, h), b_dec (h,)."""
    # BEGIN SOLUTION
    f = torch.relu((x - b_dec) @ W_enc + b_enc)
    f[:, j] = 0
    return f @ W_dec + b_dec
    # END SOLUTION


# %% tags=["check"]
check.without_feature(without_feature)

# %% [markdown] tags=["hint"]
# $b_{\text{dec}}$ stands twice in the formula: where $x$ comes in and where $\hat x$ goes out. The ReLU stands once.

# %% [markdown] tags=["hint"]
# Which axis of $f$ are the features? And is $f_j$ still 0 after the ReLU if it was set to 0 before $b_{\text{enc}}$ was added?

# %% [markdown] tags=["solution"]
# $b_{\text{dec}}$ is the activity that needs no explanation, and it is taken out and put back, so that features describe how a token *differs* from it. With all features off the reconstruction is $b_{\text{dec}}$, not 0. Nothing rectifies $\hat x$. The neurons of this book are never negative, but those of OpenAI's GPT-2, with its GELU, can be.
#
# There is a second way to switch a feature off: subtract $f_j\,w_j$ from $x$ itself. Both remove the same vector. But the first also replaces $x$ by its reconstruction, and whatever the auto-encoder gets wrong is then blamed on the feature, as below, where the error is much larger than the feature's part.

# %% tags=["solution"]
x, W_enc, W_dec = torch.randn(100, 8), 0.3 * torch.randn(8, 32), 0.1 * torch.randn(32, 8)
off = without_feature(x, W_enc, torch.zeros(32), W_dec, torch.zeros(8), 3)
part = torch.relu(x @ W_enc)[:, 3:4] * W_dec[3]
kept = x - part  # with what the auto-encoder gets wrong
print("the two differ by the error:", torch.allclose(kept - off, x - torch.relu(x @ W_enc) @ W_dec))
print("the error is more than ten times the part:", bool((kept - off).norm() > 10 * part.norm()))

# %% [markdown]
# ## Exercise 10.B: The largest of a batch
#
# - **Goal:** give a batch a budget of active features, and leave it to the tokens who needs them.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# BatchTopK takes what comes out of the encoder *before* its ReLU, $p$, and keeps of $f=\operatorname{ReLU}(p)$ the $kn$ largest of the whole batch of $n$ tokens:
#
# $$
# \tilde f_{ij}=f_{ij}\,\bigl[f_{ij}>\tau\bigr],\qquad \tau=\text{the }(kn+1)\text{-th largest of all }f_{ij} .
# $$
#
# If there is no $(kn+1)$-th, $\tau=0$. The check has batches with few positive entries, and with entries that are equal.


# %%
def batch_topk(p, k):
    """(n, m): of ReLU(p) the k·n largest entries, and 0 for all others; p is (n, m)."""
    # BEGIN SOLUTION
    f = torch.relu(p)
    n_kept = k * len(f)
    tau = f.flatten().sort(descending=True).values[n_kept] if n_kept < f.numel() else 0.0
    return torch.where(f > tau, f, 0.0)
    # END SOLUTION


# %% tags=["check"]
check.batch_topk(batch_topk)

# %% [markdown] tags=["hint"]
# Flatten, sort from the largest down, and look up one entry. Python counts from 0: where does the $(kn+1)$-th stand?

# %% [markdown] tags=["hint"]
# What is $\tau$ where fewer than $kn$ entries are positive? And what does $f_{ij}>\tau$ do with two equal entries, if there is room for one of them?

# %% [markdown] tags=["solution"]
# $\tau$ is the first entry that is *not* kept. With the threshold at the last that is, the comparison would have to be $\ge$, and ties would break the budget. With $>$ the budget is an upper limit: of equals at its edge all go. Which of them `topk` would keep depends on its implementation, so that a result would not be the same on two machines.
#
# What is kept is kept whole. A soft threshold, $\max(f-\tau,0)$, has the same support and takes $\tau$ off every entry: that is the shrinkage of the penalty, which counting was meant to avoid. And $k$ *for each token* is TopK, another method: below, half the tokens are loud and half are quiet, and with one budget for all the loud ones get more of it.

# %% tags=["solution"]
p = torch.randn(200, 64) * torch.tensor([0.3, 1.0]).repeat(100)[:, None]
active = (batch_topk(p, 8) > 0).sum(1).double()
print("active features a token:", float(active.mean()))
print("loud tokens have more than ten times as many:", bool(active[1::2].mean() > 10 * active[::2].mean()))

# %% [markdown]
# ## Exercise 10.C: Explained variance in one pass
#
# - **Goal:** compute a ratio of sums over more tokens than fit into memory.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Activations come in batches of different length, each can be read once, and there is no room to keep them. Compute
#
# $$
# \text{EV}=1-\frac{\sum_t\lVert x_t-\hat x_t\rVert^2}{\sum_t\lVert x_t-\bar x\rVert^2}
# $$
#
# over all tokens $t$ of all batches, where $\bar x\in\mathbb R^h$ is the mean of all tokens.


# %%
def explained_variance(batches):
    """A number; batches yields pairs x (n, h), x_hat (n, h), each once, with n from batch to batch another."""
    # BEGIN SOLUTION
    n = 0
    for x, x_hat in batches:
        if n == 0:
            origin, error, total, squares = x[0].clone(), 0.0, 0.0, 0.0
        n += len(x)
        error += (x - x_hat).square().sum()
        total += (x - origin).sum(0)
        squares += (x - origin).square().sum()
    return 1 - error / (squares - total.square().sum() / n)
    # END SOLUTION


# %% tags=["check"]
check.explained_variance(explained_variance)

# %% [markdown] tags=["hint"]
# $\bar x$ is not known before the end. Write $\sum_t\lVert x_t-\bar x\rVert^2$ with two sums that can be added up batch by batch.

# %% [markdown] tags=["hint"]
# $\sum_t\lVert x_t-\bar x\rVert^2=\sum_t\lVert x_t\rVert^2-\bigl\lVert\sum_t x_t\bigr\rVert^2/n$. It holds with $x_t-o$ in the place of $x_t$, for any fixed $o$. Which $o$ keeps the two terms small?

# %% [markdown] tags=["solution"]
# Three sums and a count, whatever the length of the text. A mean of the batches' own values is something else twice over: a mean of ratios is not the ratio of the sums, and each batch would be measured against its own mean, which lies nearer to it. If batches are documents, that difference is what tells documents apart, and the auto-encoder gets no credit for reconstructing it.
#
# The second hint's formula subtracts two numbers that are nearly equal when activity is large and varies little. In single precision that can be fatal, as below. An origin among the data, here the first token, costs one line and removes the danger. The true value is 0.99.

# %% tags=["solution"]
x = 10_000 + torch.randn(20_000, 4)
x_hat = x + 0.1 * torch.randn(x.shape)
x, x_hat = x.float(), x_hat.float()
naive = 1 - (x - x_hat).square().sum() / (x.square().sum() - x.sum(0).square().sum() / len(x))
streamed = explained_variance(zip(x.split(64), x_hat.split(64), strict=True))
print(f"from the first token: {float(streamed):.2f}")
print("from 0, wrong by more than 0.005:", bool(abs(naive - 0.99) > 0.005))

# %% [markdown]
# ## Exercise 10.D: The gradient of a direction
#
# - **Goal:** find the gradient that respects a constraint, for rows of any length.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Instead of normalising the dictionary after each step, one can keep rows $v_j$ of any length and decode with the directions $w_j=v_j/\lVert v_j\rVert$. The loss depends on $V$ through $W$ alone. Given $V$ and the gradient $G$ of the loss with respect to $W$, return its gradient with respect to $V$. No automatic differentiation.


# %%
def gradient_of_rows(G, V):
    """(m, h) gradient with respect to V; G (m, h) is the one with respect to V's rows divided by their lengths."""
    # BEGIN SOLUTION
    length = V.norm(dim=1, keepdim=True)
    W = V / length
    return (G - (G * W).sum(1, keepdim=True) * W) / length
    # END SOLUTION


# %% tags=["check"]
check.gradient_of_rows(gradient_of_rows)

# %% [markdown] tags=["hint"]
# A step of $v_j$ along itself changes nothing. So the gradient has no part along $v_j$, row by row.

# %% [markdown] tags=["hint"]
# Take a small step $\delta$ across $v_j$. By how much does the direction $w_j$ turn if $\lVert v_j\rVert$ is 1? And if it is 10?

# %% [markdown] tags=["solution"]
# $w=v/\lVert v\rVert$ has the derivative $\frac{\partial w}{\partial v}=\frac1{\lVert v\rVert}\bigl(I-w^{\mathsf T}w\bigr)$ (with $w$ a row): a projection, which takes out the part along $w$, and a lever, $1/\lVert v\rVert$, since the same step turns a long row less. At unit length only the projection is left, which is the chapter's rule.
#
# So the two ways differ in one thing. A step of plain gradient descent is at right angles to $v_j$, and by Pythagoras makes it longer, always. Longer rows turn less, so without normalisation the learning rate falls by itself, at another pace in each row. Below, rows are driven by gradients that are pure noise: the lengths only grow.

# %% tags=["solution"]
V = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
lengths = []
for _ in range(5):
    for _ in range(100):
        V = V - 0.1 * gradient_of_rows(torch.randn(50, 8), V)
    lengths.append(round(float(V.norm(dim=1).mean()), 1))
print("mean length after 100, 200, … steps:", lengths)

# %% [markdown]
# ## Exercise 10.E: Seven runs, six of them broken
#
# - **Goal:** read a training run from its curves, and measure what curves do not show.
# - **Difficulty:** 4 of 5
# - **Time:** 35 to 45 minutes
#
# The next cell trains seven auto-encoders of 512 features on the second layer of a packaged GPT-2, a toy on TinyWorld; that takes about half a minute. All are "relu" and pay the price $\lambda\sum_j f_j$. One run is sound. Each of the others has one fault:
#
# | name | what is wrong |
# |---|---|
# | `"none"` | nothing |
# | `"rate"` | the learning rate is ten times too high |
# | `"price"` | $\lambda$ is far too large |
# | `"lengths"` | the rows of $W_{\text{dec}}$ are not normalised |
# | `"hook"` | the hook that splices the reconstruction in forgets to return it |
# | `"order"` | the text is not shuffled: it comes domain by domain |
# | `"few"` | it is trained on the same 256 tokens again and again, and its curves are measured on these |
#
# The loss is that of training, with the price; all other curves are measured on a text of the run's own. "Nats lost" is the cross-entropy with the reconstruction spliced in, less the clean one. `runs["A"].sae` is the auto-encoder of run A, `runs["A"].seen` are the activations on which its curves were measured, and
# `runs["A"].fresh` are activations on a text with which no run has anything to do.

# %% tags=["nbval-ignore-output"]
runs = check.broken_runs()
fig, axs = plt.subplots(5, 7, figsize=(11, 7), sharex=True, sharey="row")
for column, (letter, run) in zip(axs.T, runs.items(), strict=True):
    column[0].set_title(letter)
    column[0].plot(run.losses, color="black", lw=0.8)
    for ax, name in zip(column[1:], ["L0", "dead", "explained", "nats lost"], strict=True):
        ax.plot(run.curves["step"], run.curves[name], marker=".", color="black")
for ax, name in zip(axs[:, 0], ["loss", "L0", "dead", "explained", "nats lost"], strict=True):
    ax.set_ylabel(name)
axs[0, 0].set(ylim=(0.1, 1.8))
axs[3, 0].set(ylim=(-0.3, 1))
axs[4, 0].set(ylim=(-0.1, 1.2))
fig.supxlabel("step")
plt.show()
print("loss from the first step to the last, the rest from step 30 to 240:")
for letter, run in runs.items():
    ends = ", ".join(f"{name} {values[0]:z.2f} → {values[-1]:z.2f}" for name, values in list(run.curves.items())[1:])
    print(f"{letter}: loss {run.losses[0]:.1f} → {run.losses[-1]:.1f}, {ends}")

# %% [markdown]
# Three runs look well, and one of them has learned its few tokens by heart. Curves that were measured on these very tokens may raise a suspicion, but cannot prove it, so measure it. Write a number that lies elsewhere for such a run than for a sound one, even for a sound one that was stopped half-way. The check tries it on runs that you have not seen, and then applies it to your seven.


# %%
def measurement(sae, seen, fresh):
    """A number; seen and fresh are (n, 256) activations, of unequal n, and sae(x) is the reconstruction of x."""
    # BEGIN SOLUTION
    with torch.no_grad():
        on_seen, on_fresh = (1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum() for x in (seen, fresh))
    return float(on_seen - on_fresh)
    # END SOLUTION


# %% tags=["check", "nbval-ignore-output"]
check.measurement(measurement)

# %% [markdown]
# Now say which run has which fault. Each name stands once. The check tells you how many are right, and not which.


# %%
def diagnosis():
    """The name of the fault for each run, "A" to "G"."""
    # BEGIN SOLUTION
    return {"A": "order", "B": "few", "C": "price", "D": "none", "E": "lengths", "F": "hook", "G": "rate"}
    # END SOLUTION


# %% tags=["check"]
check.diagnosis(diagnosis)

# %% [markdown] tags=["hint"]
# Begin with what a fault *must* do. The loss holds the price: where does it begin if $\lambda$ is far too large? Which curve takes no notice of training if nothing is spliced in? What does the loss do each time that a text of another kind begins?

# %% [markdown] tags=["hint"]
# For the measurement: how good a run is depends on how long it was trained, so neither number alone will do. What has learned by heart is good on one of the two texts and not on the other; a sound run, however bad, is the same on both.

# %% [markdown] tags=["hint"]
# Of the runs that look well, one is left that your measurement does not name. Exercise 10.D has told what is kept at 1, and the chapter what happens if it is not: look at `runs["D"].sae.W_dec.norm(dim=1)`, for each of them.

# %% [markdown] tags=["solution"]
# A sound run has no curve that looks better than all others. The run that has learned by heart has the lowest loss, the fewest active features among those that work and the highest explained variance; and the run whose rows grow looks a little better than the sound one, too. Both are better at what is *plotted*. This is why a curve of training belongs beside one on a text
# that training has not seen, and why a library normalises the rows and does not leave it to its user.
#
# The measurement is a difference, or a ratio, of the same quantity on two texts: 0.3 or more for what was learned by heart, next to 0 for all the rest. A level, such as the explained variance on fresh text, would tell these two runs apart as well, but it would accuse every run that was stopped early, or is bad for another reason.
#
# Two curves look alike where the causes differ: with a price far too large and with a rate far too high most features are dead. The *first* number tells them apart. A large price shows at once, in the loss, before anything is learned. And the surest sign of a broken hook is perfection: a splice that costs nothing at all, though a fifth of the variance is not explained.
# It is the most dangerous fault of the six, since it makes the headline number of a paper, the loss recovered, exactly 100 %.

# %% tags=["solution"]
for letter in "BDE":
    print(f"{letter}: half of the rows are longer than 1.2:", bool(runs[letter].sae.W_dec.norm(dim=1).median() > 1.2))
