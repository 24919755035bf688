# %% [markdown]
# # Exercises to chapter 7: does it learn?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before. Nothing here trains for long: where a trained model is
# needed, it comes with the library.

# %%
import math

import matplotlib.pyplot as plt
import torch

import cratelab as cl
from cratelab import plots
from cratelab.checks import experiment as experiment_check
from cratelab.checks import training as check
from cratelab.corpora import tinyworld
from cratelab.experiments.reference_models import load_reference
from cratelab.losses import document_log_probs

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 7.A: How far can a weight travel?
#
# - **Goal:** read a schedule as a distance, and as a forgetting.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# A step of AdamW moves a weight by about one learning rate, or less. So the sum of all rates is about the longest way that a weight can go. With steps $t = 0, \dots, t_{\text{end}} - 1$, of which the first $t_w < t_{\text{end}}$ are the warm-up,
#
# $$
# \eta_t = \eta_{\max}\frac{t+1}{t_w} \quad (t < t_w), \qquad
# \eta_t = \eta_{\min} + \frac{\eta_{\max} - \eta_{\min}}{2}\Big(1 + \cos\pi\frac{t - t_w}{t_{\text{end}} - t_w}\Big) \quad (t \ge t_w).
# $$
#
# Find $\sum_t \eta_t$ in closed form: no loop, no list of rates. It has to be right to the last step, so mind the ends.


# %%
def reach(steps, warmup, peak, final):
    """The sum of all learning rates, a number."""
    # BEGIN SOLUTION
    descent = steps - warmup
    return peak * (warmup + 1) / 2 + descent * (peak + final) / 2 + (peak - final) / 2
    # END SOLUTION


# %% tags=["check"]
check.reach(reach)

# %% [markdown]
# Weight decay multiplies a weight by $1 - \eta_t\lambda_w$ in each step, so that about $e^{-\lambda_w\sum\eta_t}$ is left of what it was at the start. For two recipes:

# %%
for name, recipe in [("CRATE toy", (1500, 150, 1e-2, 1e-3)), ("paper", (600_000, 2000, 6e-4, 6e-5))]:
    way = reach(*recipe)
    print(f"{name:17} longest way {way:7.2f}, left of the first weight {math.exp(-0.1 * way):.0e}")
end = load_reference("crate", "toy").token_embedding.weight.detach()
print(f"embeddings of the trained toy: from ±0.02 to ±{float(end.std()):.2f}")

# %% [markdown] tags=["hint"]
# The warm-up is $1 + 2 + \dots + t_w$, times $\eta_{\max}/t_w$. For the descent with $T$ steps you need $\sum_{k=0}^{T-1}\cos\frac{\pi k}{T}$.

# %% [markdown] tags=["hint"]
# $\cos\frac{\pi k}{T} = -\cos\frac{\pi(T-k)}{T}$: the terms $k$ and $T - k$ cancel. Which one has no partner?

# %% [markdown] tags=["solution"]
# The cosines cancel in pairs but for $k = 0$, so their sum is 1, and with $T = t_{\text{end}} - t_w$
#
# $$
# \sum_t\eta_t = \eta_{\max}\frac{t_w + 1}{2} + T\,\frac{\eta_{\max} + \eta_{\min}}{2} + \frac{\eta_{\max} - \eta_{\min}}{2} .
# $$
#
# A straight line from the peak to the final rate has the same sum: the cosine's shape decides *when* the way is gone, not how long it is. The last term is what one misses by taking the mean
# of the two ends; it is half a step, and harmless, until one compares two implementations.
#
# Read the numbers. In the toy's training a weight could have gone more than eight units; embeddings end at a sixth of one. Most of the way is back and forth, after noisy gradients. And in the paper's recipe
# nothing of the first weights is left: what remains is what gradients put there.

# %% [markdown]
# ## Exercise 7.B: Which tokens count?
#
# - **Goal:** measure a gap against the floor without comparing different tokens.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# A text of several documents has been scored token by token: by the world that wrote it, `log_p`, and by a model, `log_q`, both of shape `(n,)` and in nats; `document` says to which document each token belongs. Two kinds of tokens do not count:
#
# - The first of each document. The model was run over the whole stream, so its number there is a guess from the end of another document.
# - Those for which the model was not asked, because they lie beyond its context. There `log_q` is NaN, and `log_p` is not.
#
# Return the floor and the gap, in nats a token.


# %%
def floor_and_gap(log_p, log_q, document):
    """(2,): the floor and the gap, in nats a token."""
    # BEGIN SOLUTION
    first = torch.ones_like(document, dtype=torch.bool)
    first[1:] = document[1:] != document[:-1]
    counts = ~first & ~log_q.isnan()
    return torch.stack([-log_p[counts].mean(), (log_p - log_q)[counts].mean()])
    # END SOLUTION


# %% tags=["check"]
check.floor_and_gap(floor_and_gap)

# %% [markdown]
# Two trained models, in a world that neither has seen. Beside the gap stands what you would report if the floor were taken over all tokens, those that nobody had to predict among them.

# %%
world = tinyworld.generate(6_000, seed=1, context=128)
p, owner = torch.from_numpy(world.log_prob).double(), torch.from_numpy(world.document)
for kind in ("crate", "gpt2"):
    q = torch.from_numpy(document_log_probs(load_reference(kind, "toy"), world.corpus())).double()
    floor, gap = map(float, floor_and_gap(p, q, owner))
    mixed = floor + gap + float(p.mean())
    print(f"{kind:5} floor {floor:.3f}, gap {gap:.3f}, with the floor of all tokens {mixed:.3f}")

# %% [markdown] tags=["hint"]
# One mask of tokens that count, used for both numbers. A document's first token is where `document` differs from the entry before, and the very first.

# %% [markdown] tags=["hint"]
# No weights: the text was drawn from $p$, so the plain mean of $\log p - \log q$ over its tokens already estimates the expectation under $p$.

# %% [markdown] tags=["solution"]
# Most slips here are means over the wrong set. First tokens cost the world nothing (every document begins with the same token), so that a floor with them among its tokens is lower, and every gap looks larger by the same amount. That one
# cancels in a comparison of models; others do not. A mean of documents' means counts the tokens of short documents more, where models have had no time to err. Replacing NaN by 0 divides by tokens that were never scored, which makes all gaps
# smaller, and their difference with them. Subtracting token by token, and then taking one mean, cannot go wrong in this way: the difference is NaN where one of the two is missing.

# %% [markdown]
# ## Exercise 7.C: An optimiser that passes its test
#
# - **Goal:** see which parts of AdamW a single step cannot show.
# - **Difficulty:** 3 of 5
# - **Time:** 30 minutes
#
# Here is an AdamW that passes its author's test against PyTorch. It is wrong in three places. `gradients` has a row for each step, `rates` a number for each.


# %%
def plausible_adamw(w, gradients, rates, betas, decay, eps):
    b1, b2 = betas
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for g, rate in zip(gradients, rates, strict=True):
        g = g + decay * w
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w = w - rate * (m / (1 - b1)) / (v / (1 - b2) + eps).sqrt()
    return w


w, gradient = torch.randn(2, 5)
gradient = gradient.sign() * (1 + gradient.abs())
parameter = torch.nn.Parameter(w.clone())
adamw = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
parameter.grad = gradient
adamw.step()
mine = plausible_adamw(w, gradient[None], [0.01], (0.9, 0.95), 0.0, 1e-8)
torch.testing.assert_close(mine, parameter.detach(), rtol=0, atol=1e-9)
print("the author's test passes")

# %% [markdown]
# What does one step leave out, and which of the author's numbers make a line drop out? Hand in *inputs* that expose the bugs. The check gives each to the right function and to functions with one bug only.
# It names a bug when an input shows it and no other that is still unknown: what shows several at once says that something is wrong, not what. Change one thing at a time, in at most six inputs.


# %%
def exposing():
    """A list of inputs (w, gradients, rates, betas, decay, eps)."""
    # BEGIN SOLUTION
    w, step = torch.ones(2), torch.tensor([[1.0, -2.0]])
    return [
        (w, step.repeat(3, 1), [0.01] * 3, (0.9, 0.95), 0.0, 1e-8),
        (w, step, [0.01], (0.9, 0.95), 0.1, 1e-8),
        (w, step, [0.01], (0.9, 0.95), 0.0, 0.1),
    ]
    # END SOLUTION


# %% tags=["check"]
check.exposing(exposing)

# %% [markdown]
# Then write it as it should be, without `torch.optim`.


# %%
def mended_adamw(w, gradients, rates, betas, decay, eps):
    """The weights (n,) after all steps, for gradients (steps, n) and rates (steps,)."""
    # BEGIN SOLUTION
    b1, b2 = betas
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = w - rate * decay * w - rate * step
    return w
    # END SOLUTION


# %% tags=["check"]
check.mended_adamw(mended_adamw, exposing)

# %% [markdown]
# Four hundred weights at each of three sizes of gradients that are pure noise, and a decay that should halve every weight in the given steps. How much is left, with your function and with the plausible one?

# %%
steps, rate = 1400, 0.005
sizes = torch.tensor([0.01, 1.0, 100.0]).repeat_interleave(400)
start, noise = torch.full_like(sizes, 10.0), torch.randn(steps, len(sizes)) * sizes
for name, optimiser in [("plausible", plausible_adamw), ("mended", mended_adamw)]:
    left = torch.as_tensor(optimiser(start, noise, [rate] * steps, (0.9, 0.95), 0.1, 1e-8)) / 10
    shown = ", ".join(f"{abs(float(part.mean())):.2f}" for part in left.split(400))
    print(f"{name:9} left of weights with gradients of size 0.01, 1 and 100: {shown}")

# %% [markdown] tags=["hint"]
# What does the author's test leave out? It takes one step, has no decay, gradients that are not small, and a tiny ε. For which of the lines does each of these matter?

# %% [markdown] tags=["hint"]
# Change one thing at a time and set the plausible one beside `torch.optim.AdamW`: a second step; a decay, with large and with small gradients; gradients about as small as $\sqrt\epsilon$. Each shows another of the three.

# %% [markdown] tags=["hint"]
# Compare with the equations of the chapter: $\hat m_t = m_t/(1-\beta_1^t)$ with $t$ from 1, the decay outside the fraction but times $\eta_t$, and $\sqrt{\hat v_t} + \epsilon$.

# %% [markdown] tags=["solution"]
# `1 - b1` is right for $t = 1$ and divides by too little ever after: by $1-\beta_1 = 0.1$ where $1-\beta_1^t$ goes to 1. For $v$ the factor is twenty, under a root. Together later steps are $10/\sqrt{20}\approx2.2$ times too long, which looks like
# a learning rate that one has chosen badly, and is "mended" by tuning. The decay in the gradient is Adam with an $L_2$ penalty, not AdamW: the last cell shows what decoupling is for. With it every weight is halved; coupled, a weight
# with large gradients feels nothing of the decay, and one with small gradients feels little else. ε inside the root acts like $\sqrt\epsilon = 10^{-4}$, ten thousand times more than meant, and slows the weights with the smallest gradients.
#
# A test of something that iterates has to iterate: several steps, rates that change, and no constant at the value where it drops out.

# %% [markdown]
# ## Exercise 7.D: The rule of six
#
# - **Goal:** count the arithmetic of both models, and find where a rule of thumb fails.
# - **Difficulty:** 3 of 5
# - **Time:** 25 minutes
#
# Training costs six operations a parameter and token, says a rule of thumb: a multiply and an add with each parameter forward, and twice that backward. It supposes that each parameter is used once. Count the multiply–adds of a forward pass *for a token*
# of a text of $n$ tokens, for a model with width $d$, $h$ atoms or neurons, $L$ layers and $v$ tokens in its vocabulary. Count matrix products only, all of them: projections, attention scores, weighted sums of values, $T$ steps of ISTA from a code of zeros
# and the sum of atoms that it hands on, the MLP, the head. Attention computes all $n\times n$ scores, as PyTorch does without a fused kernel.


# %%
def products(d, h, L, v, n, T):
    """{"CRATE": …, "GPT-2": …}: multiply–adds of a forward pass for a token, exact integers."""
    # BEGIN SOLUTION
    attention = 2 * n * d
    ista = (1 + 2 * (T - 1) + 1) * h * d
    return {
        "CRATE": L * (2 * d * d + attention + ista) + v * d,
        "GPT-2": L * (4 * d * d + attention + 2 * h * d) + v * d,
    }
    # END SOLUTION


# %% tags=["check"]
check.products(products)

# %% [markdown]
# What the rule of six would have to be, at sizes of the paper with a context of 1,024:

# %%
for size in ("1L", "S", "B"):
    for name, kind, config in [("CRATE", cl.Crate, cl.CrateConfig), ("GPT-2", cl.Gpt2, cl.Gpt2Config)]:
        with torch.device("meta"):
            model = kind(config.preset(size))
        c, n_parameters = model.config, model.count_parameters(positions=False)
        work = products(c.width, 4 * c.width, c.n_layers, c.vocab_size, 1024, 2)[name]
        print(f"{size:3} {name}: {6 * work / n_parameters:5.2f} operations a parameter and token")

# %% [markdown] tags=["hint"]
# A product of an $(n, a)$ with an $(a, b)$ matrix is $nab$ multiply–adds, so $ab$ for a token. For a token's scores $a = p$ and $b = n$, in each of $K$ heads with $Kp = d$.

# %% [markdown] tags=["hint"]
# ISTA: the first step is $D^\top z$. Each later one needs $Da$ and $D^\top(z - Da)$. Then the layer hands on $Da$ once more. How many products with $D$ for $T = 2$?

# %% [markdown] tags=["solution"]
# With $T = 2$ the dictionary is multiplied four times, and is stored once. So CRATE at size B takes more than ten operations a parameter and token, not six, while the rule is nearly right for GPT-2, where attention alone makes the difference.
# At size 1L, nearly everything is the embedding, and the rule holds for both.
#
# Whoever calls two runs at size B equally dear because parameters times tokens are equal has given CRATE nearly twice the arithmetic. In the layers alone, without attention scores: equal parameters are twice as many layers of CRATE, at
# half as much again each, three times in all. A typical slip is to count from the list of parameters. Products are what costs, and tied weights are paid for at each use.

# %% [markdown]
# ## Exercise 7.E: An experiment of your own: does MSSA compress what it was made to compress?
#
# - **Goal:** ask of a trained network what its derivation promises, with a control that could prove it wrong.
# - **Difficulty:** 5 of 5
# - **Time:** 3 to 4 hours
#
# In the chapter, where the layer's own subspaces saw $R^c$ fall, random ones saw the same fall. Is it so for the package's toys, which have read three times as much, in longer documents? Or take another question about part III, such as: does a model that learned TinyWorld forget it when it reads Python? Are
# the neurons of two seeds the same up to their order? Which tokenisation costs fewest nats a character? How does the gap grow when each of a model's weights is rounded? Any will do whose answer you do not know yet.
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
    own, others = compression(seed)
    return {
        "first layer, own subspaces": own[0],
        "second layer, own subspaces": own[1],
        "control": others[0].mean(),
        "second layer, control": others[1].mean(),
    }


def compression(seed, draws=20):
    """R^c after MSSA / before, for each layer: with its own subspaces, (2,), and with random ones, (2, draws)."""
    model, generator = load_reference("crate", "toy", seed % 5), torch.Generator().manual_seed(seed)
    tokens = tinyworld.generate(1_000, seed=100 + seed, context=128).tokens[:896]
    own, others = [], []
    with torch.no_grad():
        x = model.token_embedding(torch.from_numpy(tokens.astype("int64")).view(7, 128))
        x = x + model.position_embedding.weight
        for block in model.blocks:
            before = block.attention_norm(x)
            after = block.attention_norm(x + block.attention(before))
            eps = float(before.norm(dim=-1).mean()) / 16  # a token's length is another in every layer
            U = block.attention.U
            random = torch.randn(draws, *U.shape, generator=generator)
            quotients = [
                cl.subspace_rate(after, bases, eps).mean() / cl.subspace_rate(before, bases, eps).mean()
                for bases in (torch.linalg.qr(each).Q for each in (U, *random))
            ]
            own.append(quotients[0])
            others.append(torch.stack(quotients[1:]))
            x = block(x)
    return torch.stack(own), torch.stack(others)
    # END SOLUTION


# %% tags=["check"]
experiment_check.conduct(experiment)

# %% [markdown] tags=["hint"]
# Start from the control. If a layer compresses against its own subspaces, ask what the same tokens do against subspaces of the same number and dimension that were drawn at random.

# %% [markdown] tags=["hint"]
# Tokens before and after: `block.attention_norm(x)` and `block.attention_norm(x + block.attention(block.attention_norm(x)))`. `cl.subspace_rate(z, U, eps)` takes bases `(k, d, p)`; `torch.linalg.qr(U).Q` makes them orthonormal. Take ε relative to the tokens' length, as in the chapter.

# %% [markdown] tags=["solution"]
# One answer among many. **Question:** is the fall of $R^c$ over MSSA due to the layer's own subspaces? **Prediction:** yes: the derivation lowers the rate against $U_k$, so that random subspaces should see less of a fall.
# **Effect:** $R^c$ after / before MSSA with the layer's subspaces, orthonormal bases. **Control:** the same tokens, twenty sets of random subspaces of the same shape. **What varies:** five models, each with a text of its own that it has not seen,
# and with random subspaces of its own.

# %% tags=["solution"]
fig, ax = plt.subplots(figsize=(6.4, 3))
found = [[], []]
for seed in range(5):
    own, others = compression(seed)
    for layer in range(2):
        found[layer].append((float(own[layer]), float(others[layer].mean()), int((own[layer] < others[layer]).sum())))
        at = layer + 0.1 * (seed - 2)
        ax.plot([at] * 20, others[layer], ".", color=plots.PALETTE[6], ms=4, label="random" * (seed + layer == 0))
        ax.plot(at, own[layer], "D", color=plots.CRATE, ms=6, label="own" * (seed + layer == 0))
ax.axhline(1, color="black", lw=0.8)
ax.set(xticks=[0, 1], xticklabels=["first layer", "second layer"], ylabel="$R^c$ after / before MSSA")
ax.legend(title="subspaces")
plt.show()
for layer, name in enumerate(["first", "second"]):
    for what, column, form in [("own", 0, "5.3f"), ("random, mean", 1, "5.3f"), ("of 20 random above own", 2, "5d")]:
        print(f"{name:6} layer, {what:22}:", "  ".join(f"{row[column]:{form}}" for row in found[layer]))

# %% [markdown] tags=["solution"]
# Each column of the table is a model. **First layer:** the prediction fails in the main. Random subspaces see most of the fall, 5 to 8 per cent where the layer's own see 6 to 10. Four of the five models compress their own subspaces by two to three points more
# than every one of twenty random sets; model 1 does not. So the first MSSA makes tokens more alike altogether, and a little more so in its own subspaces. **Second layer:** $R^c$ *rises*, by 3 to 6 per cent, and against random subspaces within a point as much: here the
# layer's own subspaces are nothing special.
#
# **What would have changed the conclusion:** quotients of random subspaces near 1. **What this does not show:** why. A layer's own subspaces may lie where tokens vary most, and random ones do not; subspaces of another seed, turned to carry as much
# of the tokens, would be the stricter control. And it holds for two layers, one world and five models.
