# %% [markdown]
# # Exercises to chapter 6: what do we train on?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before. A loss is in nats: $-\log q$, with the natural logarithm.

# %%
import re

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import pad

from cratelab import plots
from cratelab.checks import corpora_and_tokens as check
from cratelab.corpora import tinyworld

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 6.A: A fair price
#
# - **Goal:** make the losses of models with different tokenizers comparable.
# - **Difficulty:** 1 of 5
# - **Time:** 10 minutes
#
# A model was tested on documents. `nats` has one tensor a document, with the loss of each of its tokens; the last one of each document is the token that ends it. `texts` has the same documents as Python strings.
# What does the model pay for a byte of text? The end of a document is no text, but to announce it belongs to the price.


# %%
def nats_a_byte(nats, texts):
    """Nats a byte of UTF-8, a number; nats: list of (n_i,) tensors, texts: list of str."""
    # BEGIN SOLUTION
    return torch.cat(nats).sum() / sum(len(text.encode("utf8")) for text in texts)
    # END SOLUTION


# %% tags=["check"]
check.nats_a_byte(nats_a_byte)

# %% [markdown]
# Now one corpus and two models that know nothing but how frequent their tokens are. The tokens of the first are letters, those of the second are words.

# %%
world = tinyworld.generate(n_tokens=60_000, seed=0, context=128)
texts = [world.text(i) for i in range(len(world.domain))]

# %%
for name, pattern in [("letters", r"(?s)."), ("words", r"(?s) ?\w+|.")]:
    cut = [[*re.findall(pattern, text), "<end>"] for text in texts]
    symbols = sorted({token for document in cut for token in document})
    number = {token: i for i, token in enumerate(symbols)}
    ids = [torch.tensor([number[token] for token in document]) for document in cut]
    counts = torch.cat(ids).bincount()
    log_q = (counts / counts.sum()).log()
    nats = [-log_q[document] for document in ids]
    print(f"{name:8} {torch.cat(nats).mean():.1f} nats a token, {nats_a_byte(nats, texts):.1f} nats a byte")

# %% [markdown] tags=["hint"]
# The text costs the same however it is divided. So form two sums over *all* documents, and divide once.

# %% [markdown] tags=["hint"]
# `len(text)` counts characters. `text.encode("utf8")` is the text as bytes.

# %% [markdown] tags=["solution"]
# Per token the model of letters looks far better, per byte the model of words is. A token is a unit that the tokenizer's author chose; a byte is one that the text brings along.
#
# Two slips are hard to see. In English text characters and bytes are nearly the same number, so a confusion of the two stays hidden until the first Chinese document, which then looks three times as expensive as it is. And a mean of the documents' own ratios is another number than the ratio of the sums:
# a byte of a short document would count more than one of a long document.

# %% [markdown]
# ## Exercise 6.B: A table of pairs, and its true loss
#
# - **Goal:** score a model on text that it has not seen, and see what its training text would have said.
# - **Difficulty:** 2 of 5
# - **Time:** 20 minutes
#
# A bigram model guesses a token from the one before. With $N_{ab}$, how often $b$ follows $a$ in the documents `train`, it says
#
# $$
# q(b\mid a) = \frac{N_{ab} + \alpha}{\sum_{b'} (N_{ab'} + \alpha)} ,
# $$
#
# where $b'$ runs over the whole vocabulary $0,\dots,v-1$. Return its mean loss on the documents `text`, over all tokens but the first of each document, which has none before it. No loop over tokens.


# %%
def bigram_loss(train, text, v, alpha):
    """Nats a token, a number; train, text: lists of (n_i,) integer tensors, one a document."""
    # BEGIN SOLUTION
    pairs = torch.cat([document[:-1] * v + document[1:] for document in train])
    counts = pairs.bincount(minlength=v * v).view(v, v) + alpha
    nats = -(counts / counts.sum(1, keepdim=True)).log()
    return torch.cat([nats[document[:-1], document[1:]] for document in text]).mean()
    # END SOLUTION


# %% tags=["check"]
check.bigram_loss(bigram_loss)

# %% [markdown]
# Do we need the held-out text at all? We choose $\alpha$ in both ways, for a small and for a larger training set, and compare with the floor: the loss of a reader who knows how TinyWorld is made. It is for the same tokens, without the first of each document.

# %%
v = len(world.vocabulary)
all_documents = [torch.from_numpy(world.tokens[world.document == i]).long() for i in range(len(world.domain))]
training = [d for d, part in zip(all_documents, world.split, strict=True) if part == "train"]
held_out = [d for d, part in zip(all_documents, world.split, strict=True) if part != "train"]
counted = (world.document[1:] == world.document[:-1]) & (world.split != "train")[world.document[1:]]
floor = -world.log_prob[1:][counted].mean()
alphas = torch.logspace(-5, 0, 16)
fig, axs = plt.subplots(1, 2, figsize=(8.4, 3.1), sharey=True)
for ax, n in zip(axs, (4, len(training)), strict=True):
    few = training[:n]
    losses = {
        name: [float(bigram_loss(few, text, v, a)) for a in alphas]
        for name, text in [("its training text", few), ("held-out text", held_out)]
    }
    for (name, values), color in zip(losses.items(), plots.PALETTE[2:4], strict=True):
        ax.semilogx(alphas, values, color=color, marker="o", label=name)
        best = min(range(len(alphas)), key=values.__getitem__)
        print(f"{n:3} documents, α chosen on {name:17}:", end=" ")
        print(", ".join(f"{of[best]:.2f} on {which}" for which, of in losses.items()))
    ax.axhline(floor, color="black", ls="--", label="floor")
    ax.set(xlabel="α", title=f"{n} documents of training", ylim=(0, None))
axs[0].set(ylabel="nats a token")
axs[0].legend()
plt.show()
print(f"floor: {floor:.2f}")

# %% [markdown] tags=["hint"]
# The pair $(a, b)$ is the number $av + b$. `torch.bincount(…, minlength=v * v).view(v, v)` counts all of them at once.

# %% [markdown] tags=["hint"]
# Make the pairs of each document on its own and join them with `torch.cat` afterwards; the other order would make pairs of the end of one document and the beginning of the next. `table[a, b]`, with two tensors of integers, looks up all pairs at once.

# %% [markdown] tags=["solution"]
# On its training text the table is the better the smaller $\alpha$ is, always: there every pair has been seen, and what smoothing gives to others is lost. So a training loss can never choose $\alpha$, and it is a fiction besides. The table of four documents reports 1.04 nats and pays 7.46 on others: unseen pairs cost $-\log q$ each, and a tiny $\alpha$ makes that a fortune. With 851 documents few pairs are new, and the two losses come close. Neither comes near the floor: one token of context is not enough.
#
# Is the last held-out loss honest? Not quite. We chose $\alpha$ on the text on which we report the loss. One number out of sixteen, chosen on thousands of tokens, flatters very little; the clean way is a third part, the test split, that nobody looks at before the end.

# %% [markdown]
# ## Exercise 6.C: The price of not knowing
#
# - **Goal:** sum out a hidden choice exactly, in any length of text.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Before a text of $n$ tokens is written, one of $K$ authors is drawn, with probability $p(z)$, and nobody tells us which. We are given `log_prior`, $(K,)$, with $\log p(z)$, and `log_given`, $(n, K)$, with $\log p(x_i\mid x_{<i},z)$. Find
#
# $$
# \log p(x_i\mid x_{<i}) \quad\text{for all } i .
# $$
#
# It has to work for thousands of tokens, and where a token rules an author out, which is $\log p = -\infty$. No loop over tokens or authors.


# %%
def next_log_prob(log_prior, log_given):
    """(n,) log p of each token, given those before it."""
    # BEGIN SOLUTION
    log_joint = log_prior + pad(log_given.cumsum(0), (0, 0, 1, 0))
    return log_joint.logsumexp(1).diff()
    # END SOLUTION


# %% tags=["check"]
check.next_log_prob(next_log_prob)

# %% [markdown]
# What does it cost not to be told the author? Five authors write only the tokens 0 and 1, and differ in how much they like the 1. Each writes a text of 1,000 tokens.

# %%
likes = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
fig, ax = plt.subplots(figsize=(6, 3.1))
for author, like in enumerate(likes):
    ones = (torch.rand(1000) < like)[:, None]
    log_given = torch.where(ones, likes, 1 - likes).log()
    predicted = torch.as_tensor(next_log_prob(torch.full((5,), 1 / 5).log(), log_given))
    price = (log_given[:, author] - predicted).cumsum(0)
    ax.semilogx(range(1, 1001), price, color=plots.PALETTE[2:][author], label=f"{like:.1f}")
    paid = ", ".join(f"{price[n - 1]:5.2f} after {n}" for n in (10, 100, 1000))
    print(f"the author who likes 1 to {like:.1f}: {paid} tokens")
ax.axhline(float(torch.tensor(5.0).log()), color="black", ls="--", label="log 5")
ax.set(xlabel="tokens read", ylabel="nats paid so far")
ax.legend(ncols=2)
plt.show()

# %% [markdown] tags=["hint"]
# First find the probability of a whole beginning, $p(x_1,\dots,x_i)$. If the author were known it would be a product. What do two such probabilities say about one token?

# %% [markdown] tags=["hint"]
# $p(x_1,\dots,x_i) = \sum_z p(z)\prod_{j\le i}p(x_j\mid x_{<j},z)$, and a conditional probability is the ratio of two of these. What is it for $i = 0$?

# %% [markdown] tags=["hint"]
# A product over tokens is a `cumsum` of logarithms. A sum over authors of numbers of which only the logarithm is known is `torch.logsumexp`. `torch.diff` subtracts neighbours.

# %% [markdown] tags=["solution"]
# The chapter multiplies each author's $p(x_i\mid x_{<i},z)$ by the author's weight. This is the same sum, since the weight is itself a ratio: $p(z\mid x_{<i}) = p(z, x_{<i})/p(x_{<i})$. Written as a difference of two log-probabilities of *texts*, nothing has to be normalised. The row that `pad` puts on top is
# the empty text, whose probability is 1 and whose weights are the prior.
#
# The figure shows the chapter's bound: however long the text, the secret is worth $\log 5\approx1.61$ nats at most, because $p(x)\ge p(z)\,p(x\mid z)$. Single tokens may even pay something back, when a text begins unlike its author; the sum up to any place stays below the line. So a hidden choice is cheap for a
# reader who sums it out, and expensive for one who settles too early: who only uses the most likely author pays an infinite price if that author is ruled out.
#
# What goes wrong most often: the weights stay those of the prior; or they already use the token that is to be guessed, which makes the loss better than it can be. Either gives plausible numbers.

# %% [markdown]
# ## Exercise 6.D: One merge, everywhere at once
#
# - **Goal:** write the step of byte-pair encoding without a loop.
# - **Difficulty:** 4 of 5
# - **Time:** 60 minutes
#
# The chapter merges pairs symbol by symbol, in a loop. Corpora are too long for that. Here is one long stream: `ids`, $(n,)$, holds symbols from 0 to $v - 1$, and `word`, $(n,)$, says to which word of the text each belongs. Find the pair of neighbours *within a word* that occurs at most places, each place counted
# (so `aaa` has the pair `aa` twice); of equally frequent pairs the one with the smallest first symbol, then the smallest second. Replace it by the new symbol $v$, in each word from the left and without overlap: `aaa` becomes `(aa)a`, and `aaaa` becomes `(aa)(aa)`. There is at least one pair.
#
# Tensors only, no loop.


# %%
def bpe_step(ids, word, v):
    """The symbols after one merge, and the words to which they belong: two tensors (m,)."""
    # BEGIN SOLUTION
    pairs, within = ids[:-1] * v + ids[1:], word[:-1] == word[1:]
    most_frequent = pairs[within].bincount().argmax()
    match = within & (pairs == most_frequent)
    place = torch.arange(len(match))
    run_starts = match & ~pad(match[:-1], (1, 0))
    since_start = place - torch.where(run_starts, place, 0).cummax(0).values
    left = match & (since_start % 2 == 0)
    kept = ~pad(left, (1, 0))
    return torch.where(pad(left, (0, 1)), v, ids)[kept], word[kept]
    # END SOLUTION


# %% tags=["check"]
check.bpe_step(bpe_step)

# %% [markdown]
# A tokenizer for TinyWorld, from single letters. A word is cut off with the space before it, as in GPT-2.

# %%
letters = sorted(set("".join(texts)))
pieces = [piece for text in texts for piece in re.findall(r"(?s) ?\w+|.", text)]
stream = torch.tensor([letters.index(letter) for piece in pieces for letter in piece])
belongs = torch.arange(len(pieces)).repeat_interleave(torch.tensor([len(piece) for piece in pieces]))
n_letters, spelling = len(stream), list(letters)
for merge in range(1, 401):
    before, old = len(stream), stream
    stream, belongs = map(torch.as_tensor, bpe_step(stream, belongs, len(spelling)))
    at = int((stream == len(spelling)).nonzero()[0])  # all before the first new symbol stands where it stood
    spelling.append(spelling[old[at]] + spelling[old[at + 1]])
    if merge in (1, 10, 50, 100, 200, 400):
        print(f"merge {merge:3}: {spelling[-1]!r:6} replaces {before - len(stream):4} pairs;", end=" ")
        print(f"{n_letters / len(stream):.2f} letters a symbol")

# %% [markdown] tags=["hint"]
# Counting: a pair within a word is the number $av + b$, and `argmax` returns the first of several largest counts. Merging: `match` marks the places where the pair begins. Without overlaps, what becomes of a place, and what of the one after it?

# %% [markdown] tags=["hint"]
# Matches overlap only where both symbols are equal; then they stand side by side, in a run. Of each run the 1st, 3rd, 5th, … count. The place where the current run began is a running maximum, `cummax`, over the places where runs begin.

# %% [markdown] tags=["solution"]
# The only hard case is a pair of two equal symbols. In a run of matches, as in `aaaa`, each merge uses up the next place, so every other one counts from the run's start; `cummax` carries that start along. All other pairs have runs of length 1, and the same line leaves them alone. That a run cannot cross from one word
# to the next follows from `within`: between two words there is always a place without a match.
#
# Whether `aaa` counts once or twice hardly matters for a tokenizer, but it has to be fixed, like the rule for ties: two implementations that differ in either learn different merges from some point on, and then the same number stands for different text.
#
# The demonstration shows a second thing: the later a merge, the fewer pairs it replaces. Here merging must come to an end: TinyWorld has a finite list of words, and once each is one symbol, no pair is left. Open text always brings new ones.
