"""The trunk that CRATE and GPT-2 share: embeddings, pre-norm blocks, tied head, generation with a cache, files.

Notable: learned positions, weight tying without a second tensor, one named site `block.neurons` in every block, and a
cache that asks each attention how many tensors it has to remember (one for MSSA, two for attention).
"""

import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.devices import best_device as best_device  # also known by this module's name
from cratelab.storage import read_json, read_tensors, replacing, write_json, write_tensors


@dataclass
class LanguageModelConfig:
    """What every model of the family is told.

    Attributes:
        n_layers: L blocks.
        n_heads: K subspaces or attention heads.
        width: d.
        vocab_size: v; GPT-2's 50,257 tokens padded to a multiple of 64 by default.
        context: largest number of tokens the model sees at once.
    """

    n_layers: int
    n_heads: int
    width: int
    vocab_size: int = 50_304
    context: int = 1024

    presets: ClassVar[dict[str, dict]] = {
        "toy": dict(n_layers=2, n_heads=4, width=64, vocab_size=256, context=128),
        "1L": dict(n_layers=1, n_heads=4, width=128),
        "2L": dict(n_layers=2, n_heads=4, width=128),
        "3L": dict(n_layers=3, n_heads=4, width=128),
        "S": dict(n_layers=6, n_heads=12, width=768),
        "B": dict(n_layers=12, n_heads=12, width=768),
    }

    def __post_init__(self):
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1; got {getattr(self, field.name)}")
        if self.width % self.n_heads:
            raise ValueError(
                f"the width must be a multiple of the heads; got width={self.width}, n_heads={self.n_heads}"
            )

    @classmethod
    def preset(cls, name: str, **overrides) -> Self:
        """The paper's sizes "1L", "2L", "3L", "S", "B", and "toy" for a laptop; any field may be overridden.

        Raises:
            ValueError: there is no preset `name`.
        """
        if name not in cls.presets:
            raise ValueError(f"no preset {name!r}; there are {', '.join(cls.presets)}")
        return cls(**cls.presets[name] | overrides)


class LanguageModel(nn.Module):
    """Tokens in, next-token logits out (eq-05-2). Subclasses say what a block is and how it starts.

    A block takes (x, cache, position) with x (b, n, d), has an `attention` with the attribute `cache_tensors`, and a
    `neurons` identity through which its (b, n, h) neuron activations pass: hook that site to record or to steer.
    """

    config_class: ClassVar[type[LanguageModelConfig]]

    def __init__(self, config: LanguageModelConfig, block: type[nn.Module], norm: nn.Module):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = norm

    def forward(self, tokens: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (b, n) integers below `vocab_size`, n at most `context`.
            cache: from `new_cache`; filled in place.
            position: how many tokens the cache already holds. From there on tokens come one at a time.

        Returns:
            (b, n, v).

        Raises:
            ValueError: the tokens are not (b, n) integers, reach past the context, or follow a cache in bulk.
        """
        _check_tokens(tokens)
        n = tokens.shape[1]
        if position + n > self.config.context:
            raise ValueError(f"the context is {self.config.context} tokens; got {position + n}: crop them to the last")
        if position < 0 or (position and (cache is None or n > 1)):
            with_cache = "without a cache" if cache is None else "with one"
            raise ValueError(
                f"position > 0 needs a cache and takes one token at a time; got {n} at {position} {with_cache}"
            )
        x = self.token_embedding(tokens)
        x = x + self.position_embedding.weight[position : position + n]
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None, position)
        return F.linear(self.norm(x), self.token_embedding.weight)

    @property
    def kind(self) -> str:
        """The name that `load` knows the model by: that of its class below `LanguageModel`, as for its subclasses.

        Sharding, such as PyTorch's FSDP, makes a subclass of its own for every model.
        """
        return next(each.__name__ for each in type(self).__mro__ if LanguageModel in each.__bases__)

    def count_parameters(self, positions: bool = True) -> int:
        """Scalars in all parameters; without `positions`, as the paper counts them."""
        n = sum(parameter.numel() for parameter in self.parameters())
        return n if positions else n - self.position_embedding.weight.numel()

    def new_cache(self, batch: int) -> list[Tensor]:
        """One empty (cache_tensors, b, k, context, p) tensor a layer: half as large for MSSA as for attention."""
        c, weight = self.config, self.token_embedding.weight
        shape = batch, c.n_heads, c.context, c.width // c.n_heads
        return [weight.new_empty(block.attention.cache_tensors, *shape) for block in self.blocks]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        n_new: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: int | None = None,
        n_vocab: int | None = None,
    ) -> Tensor:
        """Continue each row of `tokens` by sampling.

        Args:
            tokens: prompts, (b, n) integers, n at least 1.
            n_new: tokens to add at most.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens only.
            seed: makes the draw repeatable; without it torch's global generator is used.
            stop: a token that ends its row; the row is filled up with it, and all rows done ends the call.
            n_vocab: sample among the tokens 0 to n_vocab - 1 only; a padded vocabulary has some that no text holds.

        Returns:
            (b, n + at most n_new), prompts included.

        Past the context the cache is of no use, since positions are learned: the last window is then encoded anew for
        every token, and a warning says so.

        Raises:
            ValueError: a prompt is empty, a token is not in the vocabulary, or an option is out of range.
        """
        _check_tokens(tokens)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(
                f"tokens must lie in [0, {self.config.vocab_size}); got {int(tokens.min())} to {int(tokens.max())}"
            )
        if n_new < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "generate needs n_new >= 0, temperature >= 0 and top_k >= 1; "
                f"got n_new={n_new}, temperature={temperature}, top_k={top_k}"
            )
        context = self.config.context
        if tokens.shape[1] + n_new - 1 > context:
            warnings.warn(
                f"{tokens.shape[1] + n_new} tokens do not fit the context of {context}: "
                "past it the last window is encoded anew for every token",
                stacklevel=2,
            )
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        cache = self.new_cache(len(tokens))
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        cached = 0
        for _ in range(n_new):
            if tokens.shape[1] <= context:
                logits = self(tokens[:, cached:], cache, cached)[:, -1]
                cached = tokens.shape[1]
            else:
                logits = self(tokens[:, -context:])[:, -1]
            new = _sample(logits[:, :n_vocab], temperature, top_k, generator)
            if stop is not None:
                new = new.masked_fill(done, stop)
                done |= new == stop
            tokens = torch.cat([tokens, new[:, None]], 1)
            if stop is not None and bool(done.all()):
                break
        return tokens

    def save(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors into `folder`, each replaced whole or not at all.

        Args:
            folder: made if need be.
            weights: what to write instead of the parameters held here, such as those gathered from many devices.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict() if weights is None else weights
        with replacing(folder / "config.json") as config:  # both are written before either is replaced
            write_json(config, {"model": self.kind, **asdict(self.config)})
            write_tensors(folder / "model.safetensors", tensors)

    def load_weights(self, weights: dict[str, Tensor], source: str | Path) -> None:
        """Take every parameter from `weights`.

        Raises:
            ValueError: keys are missing, left over or of another shape; each is named, with `source`.
        """
        own = self.state_dict()
        problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in weights]
        problems += [f"unexpected {name} {tuple(weights[name].shape)}" for name in weights if name not in own]
        problems += [
            f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ]
        if problems:
            raise ValueError(f"{source} does not fit {type(self).__name__}({self.config}):\n  " + "\n  ".join(problems))
        self.load_state_dict(weights)


def load(folder: str | Path) -> LanguageModel:
    """The model that `save` wrote into `folder`, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: `folder` holds no config.json or model.safetensors.
        ValueError: config.json describes no known model, or the weights do not fit it.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    name = config.pop("model", None)
    classes = {subclass.__name__: subclass for subclass in LanguageModel.__subclasses__()}
    model_class = classes.get(str(name))
    if model_class is None:
        raise ValueError(f"{folder / 'config.json'} names the model {name!r}; known are {', '.join(sorted(classes))}")
    try:
        model = model_class(model_class.config_class(**config))
    except (TypeError, ValueError, RuntimeError) as error:  # a wrong field, type or value; more than memory holds
        raise ValueError(f"{folder / 'config.json'} does not fit {name}: {error}") from error
    model.load_weights(read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
    return model.eval()


def drop_tied_head(weights: dict[str, Tensor], source: Path) -> None:
    """Remove lm_head.weight, which files from elsewhere hold beside the embedding that it is.

    Raises:
        ValueError: it is not the embedding.
    """
    head = weights.pop("lm_head.weight", None)
    if head is not None and not head.equal(weights.get("token_embedding.weight", head)):
        raise ValueError(
            f"{source}: lm_head.weight differs from the token embedding (wte.weight), but the two are tied"
        )


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens must be (b, n), n at least 1, of int32 or int64; got {tokens.dtype} {tuple(tokens.shape)}"
        )


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
