# %% [markdown]
# # Exercises to chapter 8: what does it mean to explain a neuron?
#
# Write the functions below; the check below each tries yours and says what is likely to be wrong. Hints, folded, stand between the two: each tells more than the one before. All numbers are in double precision, words are integers.
# A neuron has the activation $a_t$ at token $t$. Excerpts $E$ explain it, excerpts $V$ validate the explanation, and the score is Pearson's correlation of $a$ with a simulation $s$:
#
# $$
# n_t=\min\Bigl(10,\Bigl\lfloor 10\,\frac{\max(0,a_t)}{M}\Bigr\rfloor\Bigr),\quad M=\max_E\max(0,a),\qquad
# \rho=\frac{\sum_{t\in V}(a_t-\bar a)(s_t-\bar s)}{\sqrt{\sum_{t\in V}(a_t-\bar a)^2\;\sum_{t\in V}(s_t-\bar s)^2}} .
# $$

# %%
import matplotlib.pyplot as plt
import torch

from cratelab import plots
from cratelab.checks import own_sentence
from cratelab.checks import scoring_a_neuron as check
from cratelab.experiments.reference_models import load_reference
from cratelab.interpret.records import collect_records
from cratelab.reading import watch_neurons

plots.use_style()
torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## Exercise 8.A: What moves a score
#
# - **Goal:** predict which changes a score notices, and what dropping silent neurons does to a mean.
# - **Difficulty:** 1 of 5
# - **Time:** 10 minutes
#
# A neuron is active on some tokens and silent on the rest; its simulation is roughly right, and the score is somewhere between 0 and 1. Say whether the score goes `"up"`, goes `"down"`, stays the `"same"` or becomes `"undefined"` if
#
# - `louder`: all activations are multiplied by 3,
# - `offset`: 5 is added to the simulation everywhere,
# - `flat`: the simulation is 1 everywhere,
# - `silence`: as many tokens again are added to $V$, on which both the neuron and the simulation are 0,
# - `surprise`: at one token, where the simulation says 0, the activation becomes ten times the largest.
#
# And what becomes of the mean over a layer of twenty neurons, all with positive scores, if the two with the lowest fall silent in $V$ and
#
# - `dropped`: neurons without a score are left out of the mean,
# - `zeroed`: neurons without a score count as 0.
#
# The check will measure them.


# %%
def changes_of_the_score():
    """{"louder": "up", "down", "same" or "undefined", "offset": …, "flat": …, …}"""
    # BEGIN SOLUTION
    return {
        **{"louder": "same", "offset": "same", "flat": "undefined", "silence": "up", "surprise": "down"},
        **{"dropped": "up", "zeroed": "down"},
    }
    # END SOLUTION


# %% tags=["check"]
check.changes_of_the_score(changes_of_the_score)

# %% [markdown] tags=["hint"]
# Both $a$ and $s$ enter the correlation only as $a_t-\bar a$ and $s_t-\bar s$, and each is divided by its own spread. What is the spread of a constant?

# %% [markdown] tags=["hint"]
# A token adds $(a_t-\bar a)(s_t-\bar s)$ to the numerator. Which sign does that have where both are silent? And what does a token with a huge $a_t-\bar a$ add to the denominator?

# %% [markdown] tags=["solution"]
# `louder` and `offset` change nothing: a simulator has to get the shape right, not the scale. `flat` is $0/0$. `silence` raises the score, if not by much: where both are 0 both lie below their means, which counts as agreement. Foretelling silence is the easy part of the work, and the rarer a neuron fires the more of it
# there is. `surprise` lowers the score, here to almost nothing: one token that nobody foretold outweighs hundreds that were.
#
# `dropped` goes up although the layer got worse. Nothing was explained better; the two worst left the mean, and who left was decided by the sample. `zeroed` goes down. Neither is the truth about a neuron that we have not seen firing, so report both, and the share.

# %% [markdown]
# ## Exercise 8.B: A table for one neuron
#
# - **Goal:** explain a neuron by a table of words, and simulate text that was not seen.
# - **Difficulty:** 2 of 5
# - **Time:** 15 minutes
#
# Make every activation of $E$ an integer $n_t$ from 0 to 10. The table holds for each word of $E$ the mean of $n_t$ over *all* its places in $E$. The simulation of $V$ looks its words up and says 0 for a word that is not there. If no activation of $E$ is positive, the simulation is 0 everywhere.
# One of the four arguments is a temptation.


# %%
def simulate_by_table(words_e, activations_e, words_v, activations_v):
    """The simulation of V, of the shape of words_v; words and activations are (excerpts, tokens)."""
    # BEGIN SOLUTION
    strength = activations_e.clamp(min=0)
    largest = strength.max()
    if largest == 0:
        return torch.zeros(words_v.shape)
    tenths = (10 * strength / largest).floor().clamp(max=10)
    table = {word: float(tenths[words_e == word].mean()) for word in words_e.unique().tolist()}
    return torch.tensor([[table.get(word, 0.0) for word in excerpt] for excerpt in words_v.tolist()])
    # END SOLUTION


# %% tags=["check"]
check.simulate_by_table(simulate_by_table)

# %% [markdown] tags=["hint"]
# `words_e == word` is true at all places of a word, in all excerpts at once. Index the integers with it and take the mean.

# %% [markdown] tags=["hint"]
# Activations can be negative, and all of those of $E$ can be. What is $M$ then, and what would you divide by? A dictionary's `get(word, 0.0)` answers for words that it does not hold.

# %% [markdown] tags=["solution"]
# The temptation is `activations_v`. Whoever simulates $V$ must not know how strong the neuron is there; $M$ belongs to $E$. With this score a wrong $M$ would be nearly harmless, since the correlation ignores the scale, and that is what makes it a bad habit: it would show only
# with the next score. (Nearly, because rounding down to a tenth of a larger $M$ wipes out weak activations.)
#
# Two slips change what an explanation says. The mean over the places where the neuron *fires* calls a word strong that excites the neuron once in a hundred times. The sum calls a word strong because it is frequent. The table below shows a neuron that fires on word 1 always and on word 0, ten times as frequent, now and then.

# %% tags=["solution"]
words = (torch.rand(20, 50) < 1 / 11).long()
activations = torch.where(words == 1, 1.0, (torch.rand(words.shape) < 0.15).double())
for name, over in [
    ("mean over all places", lambda n: n.mean()),
    ("mean where it fires", lambda n: n[n > 0].mean()),
    ("sum", lambda n: n.sum()),
]:
    print(f"{name:21}", [round(float(over(activations[words == word])), 1) for word in (0, 1)], "for words 0 and 1")

# %% [markdown]
# ## Exercise 8.C: A split that passes its test
#
# - **Goal:** find three bugs that a roomy example hides.
# - **Difficulty:** 2 of 5
# - **Time:** 30 minutes
#
# Excerpts are windows of `width` tokens. The one for place $c$ starts at $c-\lfloor\text{width}/2\rfloor$, and is *moved*, whole, into the text where it would stick out. Of ten strongest places, by falling activation, ranks 0, 2, 4, 6, 8 explain; the others validate, and so do five random places.
# A token that stands in $E$ is taken out of all windows of $V$; the rest of such a window stays.
#
# **By hand.** A text of ten tokens, windows of four, and of the strongest places only three, 1, 9 and 5, by falling activation. The window of place 1 would start at $1-2=-1$; moved, it is 0 to 3. That of place 9 would start at 7 and end behind the text; moved, it is 6 to 9. That of place 5 is 3 to 6.
# Ranks 0 and 2, the places 1 and 5, explain: in $E$ the ten tokens stand $1, 1, 1, 2, 1, 1, 1, 0, 0, 0$ times, token 3 in both windows. Rank 1, place 9, validates. Of its tokens 6, 7, 8, 9 the first stands in $E$ and is taken out: in $V$ they stand $0, 0, 0, 0, 0, 0, 0, 1, 1, 1$ times.
#
# Somebody wrote a function that counts how often each of the `n` tokens of a text stands in $E$, and in $V$. Its test passes, and it is wrong in three places.


# %%
def plausible_split(top, random, width, n):
    counts = torch.zeros(2, n)
    for row, centres in enumerate([top[:5], torch.cat([random, top[5:]])]):
        for centre in centres.tolist():
            start = centre - width // 2
            counts[row, start : start + width] += 1
    return counts


top, others = 50 + 40 * torch.randperm(10), 30 + 40 * torch.randperm(10)[:5]
counts = plausible_split(top, others, 8, 500)
assert counts.sum(1).tolist() == [5 * 8, 10 * 8] and not (counts[0] * counts[1]).any()
print("the author's test passes: 5 and 10 windows, nothing in both")

# %% [markdown]
# Which inputs did the test avoid, and with what did it not compare? Hand in *inputs* that expose the bugs. The check gives each to the right function and to functions with one bug only.
# It names a bug when an input shows it and no other that is still unknown: what shows several at once says that something is wrong, not what. Change one thing at a time, in at most six inputs.


# %%
def exposing():
    """A list of inputs (top, random, width, n), with ten different places in top."""
    # BEGIN SOLUTION
    top, clear = 50 + 40 * torch.arange(10), torch.full((5,), 30)
    early = torch.cat([torch.tensor([1]), top[1:]])
    return [(top, clear, 8, 500), (early, clear, 8, 500), (top, top[:5], 8, 500)]
    # END SOLUTION


# %% tags=["check"]
check.exposing(exposing)

# %% [markdown]
# Then write the function as it should be.


# %%
def mended_split(top, random, width, n):
    """(2, n): how often each token stands in E, and in V, for places top (10,) and random (5,)."""
    # BEGIN SOLUTION
    counts = torch.zeros(2, n)
    for row, centres in enumerate([top[::2], torch.cat([random, top[1::2]])]):
        for centre in centres.tolist():
            start = min(max(centre - width // 2, 0), n - width)
            counts[row, start : start + width] += 1
    counts[1, counts[0] > 0] = 0
    return counts
    # END SOLUTION


# %% tags=["check"]
check.mended_split(mended_split, exposing)

# %% [markdown] tags=["hint"]
# The places of the test are far from each other and far from both ends. What does Python make of `counts[0, -2:6]`? And of a window that runs over the end?

# %% [markdown] tags=["hint"]
# Random places are drawn without looking at the strongest. And what does the *mean activation* of the windows in $E$ and of the strong windows in $V$ have to be like, if $V$ is to test what $E$ taught?

# %% [markdown] tags=["solution"]
# `top[:5]` explains from the five best and validates on the next five: the neuron is then explained where it is strongest and tested where it is weaker, while alternate ranks give both sets nearly the same range. A negative start counts from the end, so `counts[0, -2:6]` is empty, and a strong place at the beginning of a document is lost without an error.
# The author's own places show the first bug: only sums were looked at, and no right answer was beside them. And nobody took $E$'s tokens out of $V$. The author's test could not see this, because its random places keep clear of the strong ones; real ones fall where they fall.
#
# The example by hand, by machine:

# %% tags=["solution"]
by_hand = mended_split(torch.tensor([1, 9, 5]), torch.tensor([], dtype=torch.long), 4, 10)
assert by_hand.tolist() == [[1, 1, 1, 2, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]]
print(by_hand.long())

# %% [markdown] tags=["solution"]
# How much does a leak matter? A neuron of pure noise means nothing, so its score should be 0. Here every word occurs once, so that the table knows noise by heart, and only that which leaks can be foretold.

# %% tags=["solution"]
scores = {"with the leak": [], "without": []}
for _ in range(100):
    noise, random = torch.rand(600), torch.randint(600, (5,))
    explains = mended_split(noise.topk(10).indices, random, 32, 600)[0] > 0
    simulated = noise * explains
    places = ((random - 16).clamp(0, 600 - 32)[:, None] + torch.arange(32)).flatten()
    for name, here in [("with the leak", places), ("without", places[~explains[places]])]:
        constant = len(here) == 0 or simulated[here].max() == simulated[here].min()
        rho = 0.0 if constant else torch.corrcoef(torch.stack([noise[here], simulated[here]]))[0, 1]
        scores[name].append(float(rho))
for name, values in scores.items():
    print(f"random windows, {name:13}: mean score of noise {sum(values) / len(values):.1f}")

# %% [markdown]
# ## Exercise 8.D: The score of a layer
#
# - **Goal:** string together, correlate once, and account for neurons that have no score.
# - **Difficulty:** 3 of 5
# - **Time:** 20 minutes
#
# Of each of $h$ neurons there are $k$ excerpts of at most $w$ tokens. The places that hold text are `present`; at the others activation and simulation are 0, which does not count. A neuron's score is one correlation over all its excerpts. It has none if its activations or its simulation are constant on $V$.
# Return the mean over the neurons that have a score, the mean over all with 0 for those that have none, and the share of those that have none. At least one neuron has a score. No `pearsonr`, no `corrcoef`.
#
# **By hand.** Three neurons, two excerpts of at most two tokens; the second excerpt has one, and a dot stands where there is no text.
#
# | neuron | activations | simulation | strung together | score |
# |---|---|---|---|--:|
# | 0 | 1 2, 3 · | 2 4, 6 · | (1, 2, 3) with (2, 4, 6) | 1 |
# | 1 | 0 2, 1 · | 1 0, 2 · | (0, 2, 1) with (1, 0, 2), centred (−1, 1, 0) with (0, −1, 1) | $-1/(\sqrt2\sqrt2)=-0.5$ |
# | 2 | 0 1, 0 · | 3 3, 3 · | the simulation is constant | none |
#
# So the answer is $\frac{1-0.5}2=0.25$, then $\frac{1-0.5+0}3=0.17$, then a share of $\frac13$. With the dots as zeros neuron 1 would have −0.09, and neuron 2 would have a score.


# %%
def layer_score(activations, simulated, present):
    """(mean of the defined, mean with 0 for undefined, share of undefined); all arguments are (h, k, w)."""
    # BEGIN SOLUTION
    defined = []
    for a, s, here in zip(activations, simulated, present, strict=True):
        a, s = a[here], s[here]  # all excerpts, one after another
        if a.max() > a.min() and s.max() > s.min():
            a, s = a - a.mean(), s - s.mean()
            defined.append(float(a @ s / (a.norm() * s.norm())))
    h = len(activations)
    return sum(defined) / len(defined), sum(defined) / h, 1 - len(defined) / h
    # END SOLUTION


# %% tags=["check"]
check.layer_score(layer_score)

# %%
activations = torch.tensor([[[1.0, 2], [3, 0]], [[0, 2], [1, 0]], [[0, 1], [0, 0]]])
simulated = torch.tensor([[[2.0, 4], [6, 0]], [[1, 0], [2, 0]], [[3, 3], [3, 0]]])
text = torch.tensor([[True, True], [True, False]]).expand(3, 2, 2)
by_hand = torch.as_tensor(layer_score(activations, simulated, text))
torch.testing.assert_close(by_hand, torch.tensor([1 / 4, 1 / 6, 1 / 3]), check_dtype=False)
print("the example: {:.2f} of the defined, {:.2f} with 0, {:.2f} without a score".format(*by_hand.tolist()))
dots = torch.as_tensor(layer_score(activations, simulated, torch.ones_like(text)))
print("with the dots as zeros: {:z.2f}, {:z.2f}, {:z.2f}".format(*dots.tolist()))

# %% [markdown] tags=["hint"]
# `a[here]` with a mask of the shape `(k, w)` gives one long vector: all excerpts of the neuron, without the places that hold no text.

# %% [markdown] tags=["hint"]
# What is `torch.full((1000,), 0.1)` minus its mean, in floating point? A test for "constant" that does not need a mean is safer.

# %% [markdown] tags=["solution"]
# Stringing together first is not a matter of taste. Within a strong excerpt the simulation has to tell the strong tokens from the weak; between excerpts it has to tell strong excerpts from random ones. Mean correlations of single excerpts ask only for the first. Below, the simulation knows which excerpts are strong, and nothing about
# their tokens. Strung together it has a good score; each on its own, none but luck. (And excerpts where the neuron is silent would have no score at all, which is most of the random ones.)
#
# The mean of a thousand times 0.1 is not exactly 0.1. What is left, some $10^{-17}$ at every token, looks like a spread, and the correlation becomes a finite number made of rounding errors: the neuron counts as badly explained where it should count as having no score. So compare the largest value with the smallest.

# %% tags=["solution"]
strong = torch.tensor([1.0] * 5 + [0.1] * 5)[:, None]
a = strong * torch.rand(10, 64)
s = strong + 0.05 * torch.rand(10, 64)
everywhere = torch.ones(1, 10, 64, dtype=torch.bool)
together = layer_score(a[None], s[None], everywhere)[0]
alone = layer_score(a[:, None], s[:, None], everywhere.transpose(0, 1))[0]
print(f"strung together {together:.1f}, excerpt by excerpt {abs(alone):.1f}")

# %% [markdown]
# ## Exercise 8.E: The strongest excerpts
#
# - **Goal:** choose what is shown of a neuron, without showing it twice.
# - **Difficulty:** 4 of 5
# - **Time:** 25 minutes
#
# The window for token $c$ starts at $c-\lfloor\text{width}/2\rfloor$, and is moved where it would cross the beginning or the end of $c$'s document; no document is shorter than a window. Walk the tokens by falling activation, as long as it is positive, and keep a token's window unless it overlaps one that was kept, until there are $k$.
# Return the $k$ starts in this order, and $-1$ for those that are missing.


# %%
def strongest_windows(activations, document, width, k):
    """(k,) places of first tokens; activations (n,), document (n,) the number of each token's document, rising."""
    # BEGIN SOLUTION
    starts = []
    for centre in activations.argsort(descending=True).tolist():
        if activations[centre] <= 0 or len(starts) == k:
            break
        own = (document == document[centre]).nonzero()[:, 0]
        start = min(max(centre - width // 2, int(own[0])), int(own[-1]) + 1 - width)
        if all(abs(start - kept) >= width for kept in starts):
            starts.append(start)
    return torch.tensor(starts + [-1] * (k - len(starts)))
    # END SOLUTION


# %% tags=["check"]
check.strongest_windows(strongest_windows)

# %% [markdown] tags=["hint"]
# `activations.argsort(descending=True)` is the order of the walk. First find where the window stands once it has been moved, then ask whether it overlaps.

# %% [markdown] tags=["hint"]
# Two windows of one width overlap exactly if their starts are less than `width` apart. The distance of the two *tokens* decides nothing: think of one that stands first in a document.

# %% [markdown] tags=["solution"]
# The rule is greedy and short, and three of its details are easy to lose. A window that was refused must not bar others, or a strong place is lost to one that is not shown. Overlap is a matter of windows and not of tokens, because windows are moved at the ends of documents. And one has to go on walking
# until $k$ are *kept*: the ten strongest tokens often stand close together, so that of them only a few windows are left.
#
# That is also the price of the shortcut that takes the ten strongest tokens as they come. The neuron below rises and falls slowly. Its ten strongest tokens show a few places again and again; and since ranks alternate between $E$ and $V$, what is explained is then validated on the same text.

# %% tags=["solution"]
smooth = torch.randn(4031).unfold(0, 32, 1).mean(1)
document, width = torch.arange(4000) // 400, 64
overlapping = (smooth.argsort(descending=True)[:10] - width // 2).clamp(min=0)
apart = strongest_windows(smooth, document, width, 10)
fig, ax = plt.subplots(figsize=(8.4, 2.6))
ax.plot(smooth, color="0.6", lw=0.8)
for starts, height, color, name in [
    (overlapping, 1.1, plots.PALETTE[4], "ten strongest tokens"),
    (apart, 1.3, plots.PALETTE[2], "ten strongest windows apart"),
]:
    y = height * float(smooth.max())
    ax.hlines([y] * 10, starts, starts + width, color=color, lw=5, label=name)
    shown = torch.zeros(4000)
    for start in starts.tolist():
        shown[start : start + width] = 1
    print(f"{name}: {int(shown.sum())} different tokens of {10 * width}")
ax.set(xlabel="token", ylabel="activation", ylim=(None, 1.9 * float(smooth.max())))
ax.legend(ncols=2, loc="upper right")
plt.show()

# %% [markdown]
# ## Exercise 8.F: Your own sentence
#
# - **Goal:** explain a neuron of a trained network in your own words, and have the sentence tested on text that nobody has seen.
# - **Difficulty:** 4 of 5
# - **Time:** 30 minutes
#
# Below are eight of the strongest excerpts of a neuron, and four at random places: neuron 152 in the second layer of a CRATE that the package carries (layers and neurons are counted from 0). The text is TinyWorld's, of documents on which the network was not trained. In brackets behind a word stands the neuron's activation there, in tenths of its maximum, rounded down; a word without brackets leaves it silent.
# Read them, write down in one sentence *when* the neuron is active, and then the same sentence as a function that says, from a word and the words of the document before it, how active the neuron is, from 0 to 10. (True and False count as 10 and 0. At the first word of a document nothing stands before it: `before` is empty there.) That the sentence and the function say the same is on your honour: the check can read only the function.
#
# The check tries your function on the text shown, and on a fresh text only when it holds there: each look at a text makes it less fresh. Its score is $\rho$ with *all* of a text for $V$, some 20,000 tokens. **It has to reach 0.55.** The bar was fixed beforehand: no table of words gets more than 0.51 on this neuron, so that 0.55 needs something of what stands before the word.
# Beside your score stand what tables and the frequencies of words reach, and the same sentence said of other neurons, and of a network that was never trained. If another neuron fits your sentence as well as this one does, the sentence is not wrong: it says what several neurons have in common, and not what sets this one apart.


# %%
crate = load_reference("crate", "toy", seed=1)
records = collect_records(crate, own_sentence.text(seed=1).corpus(), window=32, n_top=8, n_random=4)
vocabulary = own_sentence.text(seed=1).vocabulary


def show(layer, neuron):
    """Print a neuron's excerpts: the strongest, by falling activation, then those at random places."""
    for title, excerpts in (("strongest", records.top), ("at random", records.random)):
        for i, (words, activations) in enumerate(
            zip(excerpts.tokens[layer, neuron], excerpts.activations[layer, neuron], strict=True)
        ):
            tenths = (10 * activations / records.maximum[layer, neuron]).floor().long().tolist()
            said = [
                vocabulary[word].replace("\n", "\\n") + (f"[{tenth}]" if a > 0 else "")
                for word, tenth, a in zip(words.tolist(), tenths, activations.tolist(), strict=True)
                if word >= 0
            ]
            print(f"{title} {i}:", *said)


show(1, 152)


# %%
def sentence():
    """When is the neuron active? One sentence, of 4 to 60 words."""
    # BEGIN SOLUTION
    return (
        "The full stop in a text that counts things: strong after a sum or a list, weak where the sum is still to come."
    )
    # END SOLUTION


def activation(before, word):
    """0 to 10: how active the neuron is at `word`; `before` is the list of the document's words before it, at first empty."""
    # BEGIN SOLUTION
    if word != "." or not {"count", "number", "make", "leaves"} & {*before}:
        return 0
    return 1 if before[-1] == "more" else 9
    # END SOLUTION


# %% tags=["check"]
own_sentence.activation(activation, sentence)

# %% [markdown] tags=["hint"]
# On which word does the neuron have its large values? Write the function that says 10 on this word and 0 elsewhere, and let the check tell what is wrong with it.

# %% [markdown] tags=["hint"]
# Then look for the same word where the neuron is silent: in the random excerpts, and in the strongest ones at values of 0 and 1. What kind of text is it in, and what stands just before? `before` holds all words of the document so far, so `"apple" in before` asks what the text is about, and `before[-1]` is the word just before.

# %% [markdown] tags=["hint"]
# It is the full stop, in texts of one domain: those in which things are counted. The words `count`, `make`, `leaves` and `number` give these texts away. Two refinements may be tried: is a number the word before? And what of "gets three more ."?

# %% [markdown] tags=["solution"]
# "A full stop" has 0.51, and no more can be had from any list of words. That another neuron fits this sentence better, with 0.71, is the second control's way of saying that it is not about ours. "A full stop in a text that counts" has 0.73, "a full stop after a number" 0.64, both on text that neither the network nor you had seen, where the untrained network has nothing above 0.3.
#
# What is the neuron for? After such a full stop a new sum begins, and everything is open again; after "gets three more" the next word is known to be "now". So the neuron may say "a new sentence of this kind starts here". The excerpts cannot tell: they show when a neuron is active, not what for. And more than two fifths of its variance, $1-\rho^2$, have not been foretold, although the sentence sounds complete. A good score is not a full explanation; look at what the neuron does in dialogues, where it is a third as active at full stops.
#
# One caution about the other row: of the other 511 neurons one fits the sentence as well, nearly. A network has several neurons for one thing, so an explanation can be right and not be *this* neuron's alone.

# %% [markdown]
# **A second neuron, if you like.** Neuron 0 of the same layer was chosen by its number. Below are its excerpts, and what your function for the other neuron is worth on it. Write a second function for it, and put it in the place of `activation`. There is no bar: the best that one can do here may be to say that no sentence will.

# %%
show(1, 0)
own_sentence.scores(activation, 1, 0)

# %% [markdown] tags=["solution"]
# The honest answer is "it is not one thing". All of its strongest excerpts are from stories, and most of their large values are on full stops: "the full stop in a story" is the sentence that they ask for, and it sounds as good as the first neuron's. It has less than 0.4. The random excerpts said so: there the neuron is active in a piece of code.
# Below is where its activity is, by domain. Less than half is in stories; a quarter is in code, and a fifth in news of the markets. The eight strongest excerpts come from the one domain where it is strongest, and whoever reads these alone writes a good sentence about less than half of the neuron. An explainer that has to write a sentence writes one; that is why $V$ has random excerpts.


# %% tags=["solution"]
def full_stop_in_a_story(before, word):
    return word == "." and bool({"secret", "friend", "rode", "walked", "ran", "kept"} & {*before})


own_sentence.scores(full_stop_in_a_story, 1, 0)
world = own_sentence.text(seed=2)
activity = dict.fromkeys(sorted(set(world.domain.tolist())), 0.0)
documents = watch_neurons(crate, world.corpus(), batch=1)  # one after another
for domain, (_, layers) in zip(world.domain.tolist(), documents, strict=True):
    activity[domain] += float(layers[1][..., 0].sum())
for domain, value in activity.items():
    print(f"{domain:10}{100 * value / sum(activity.values()):4.0f} % of its activity")
