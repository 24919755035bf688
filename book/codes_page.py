"""Write what the page "Type a sentence" computes with: the packaged toy CRATE, its words, and the still picture.

    python book/codes_page.py

book/type_a_sentence_model.html is the model as JSON in a `<script>` that does nothing. The page includes it, fetches
nothing, and works from a disk. The weights are the package's own, in half precision, so nothing is rounded.
"""

import base64
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from notebooks import BOOK
from torch import Tensor

from cratelab import plots
from cratelab.corpora.prepare import tinyworld_encoding
from cratelab.crate import Crate
from cratelab.experiments.reference_models import load_reference
from cratelab.reading import hooked
from cratelab.storage import write_text
from cratelab.viewers.frame import script_data

MODEL, PICTURE = BOOK / "type_a_sentence_model.html", BOOK / "_static" / "type_a_sentence.png"
# Of text that TinyWorld generates. The first two have a word in common, in two senses.
SENTENCES = {
    "law": "notes on the cell . Frost sues Reed over the cell . the claim is for twelve pounds . "
    "for these reasons Frost wins twelve pounds from Reed .",
    "biology": "notes on the cell . we studied strain kappa of the mouse . the dose was seven units . "
    "our results show that seven units suit strain kappa .",
    "a story": "once there was a brave girl named Rosa . her friend was Hugo . their secret word was velvet . "
    "at last Rosa said the secret word : velvet . the end .",
    "a dialogue": "notes on the garden . Clara and Max talked about the song . they meet in room seven . "
    'finally Clara said : " i see you in room seven . "',
    "markets": "the bond . shares of Lumo opened at nine dollars . the chairman is Felix . "
    "at the close Lumo stood at nine dollars .",
    "counting": "notes on the cups . Sara likes to count the plums . the lucky number is three . "
    "eleven less nine leaves two . so the lucky number was three .",
    "code": "the mouse . def main ( ) : \\n score = 4 \\n print ( score ) # 4 \\n return score # 4 \\n",
}


def packed(model: Crate) -> dict:
    """All that the script needs, to be written as JSON.

    Raises:
        ValueError: a weight is no number of half precision.
    """
    weights, config = model.state_dict(), model.config
    halves = [tensor.half() for tensor in weights.values()]
    if any((half.float() != tensor).any() for half, tensor in zip(halves, weights.values(), strict=True)):
        raise ValueError("the weights are not those of half precision that the package carries")
    data = b"".join(half.numpy().astype("<f2").tobytes() for half in halves)
    names = "n_layers", "n_heads", "width", "n_neurons", "vocab_size", "context"
    return {
        "config": {name: getattr(config, name) for name in names},
        "trained": {"lam": config.lam, "stepSize": config.step_size, "steps": config.n_steps},
        "cliff": min(cliffs(model)),
        "words": tinyworld_encoding().vocabulary,
        "sentences": SENTENCES,
        "tensors": [[name, *tensor.shape] for name, tensor in weights.items()],
        "weights": base64.b64encode(data).decode(),
    }


def cliffs(model: Crate) -> list[float]:
    """2/‖D‖² of each layer: below it the objective of ISTA falls at every step."""
    norms = [torch.linalg.matrix_norm(block.ista.D.detach().double(), 2) for block in model.blocks]
    return [round(2 / norm.item() ** 2, 4) for norm in norms]


def fragment(model: Crate) -> str:
    return f'<script type="application/json" id="type-a-sentence-model">{script_data(packed(model))}</script>\n'


@torch.no_grad()
def codes_of(model: Crate, sentence: str) -> tuple[list[str], list[Tensor], float]:
    """The words of a sentence after <begin>, each layer's codes (n, h), and the loss in nats a word."""
    words = ["<begin>", *sentence.split()]
    tokens = torch.tensor([tinyworld_encoding().encode_ordinary(" ".join(words))])
    seen: list[Tensor] = []
    with hooked(*((block.neurons, lambda module, inputs, codes: seen.append(codes[0])) for block in model.blocks)):
        logits = model(tokens)
    return words, seen, torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()


def draw(model: Crate, path: Path) -> None:
    """The codes of the first sentence, as the page shows them before anything is moved."""
    plots.use_style()
    words, layers, loss = codes_of(model, SENTENCES["law"])
    colours = LinearSegmentedColormap.from_list("codes", ["#ffffff", "#bcd8ea", plots.CRATE, "#00324f"])
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 5), sharey=True, layout="constrained")
    for number, (ax, codes) in enumerate(zip(axes, layers, strict=True), start=1):
        first = torch.where((codes > 0).any(0), (codes > 0).int().argmax(0), len(words))
        largest = codes.amax(0)
        order = sorted(range(codes.shape[1]), key=lambda i: (first[i].item(), -largest[i].item()))
        ax.imshow(codes[:, order].sqrt(), aspect="auto", cmap=colours, interpolation="nearest")
        on = (codes > 0).sum(-1).float().mean()
        ax.set(title=f"layer {number}: {on:.0f} of {codes.shape[1]} neurons on", xlabel="neurons, by first use")
        ax.grid(False)
    axes[0].set_yticks(range(len(words)), words)
    figure.suptitle(f"λ = 0.1, η = 0.1, T = 2: {loss:.2f} nats a word")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    model = load_reference("crate", "toy", 0)
    write_text(MODEL, fragment(model))
    draw(model, PICTURE)


if __name__ == "__main__":
    main()
