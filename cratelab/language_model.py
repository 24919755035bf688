"""The trunk that CRATE and GPT-2 share: configuration, embeddings, pre-norm blocks, tied head, cache, files.

Notable: learned positions, weight tying without a second tensor, one named site `block.neurons` in every block, and a
cache that asks each attention how many tensors it has to remember (one for MSSA, two for attention).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab import generation
from cratelab.devices import memory
from cratelab.storage import replacing, write_json, write_tensors
from cratelab.weights import check_shapes


@dataclass
class LanguageModelConfig:
    """What every model of the family is told.

    Attributes:
        n_layers: L blocks.
        n_heads: K subspaces or attention heads.
        width: d.
        vocab_size: v; GPT-2's 50,257 tokens padded to a multiple of 64 by default.
        context: largest number of tokens the model sees at once.
        expansion: h/d, neurons per dimension.
        span: how many tokens back a layer may look; all unless given. With 0 the model is context-free, a control.

    Raises:
        ValueError: a field is of another type than stated or out of its range, or the heads do not divide the width.
    """

    n_layers: int
    n_heads: int
    width: int
    vocab_size: int = 50_304
    context: int = 1024
    expansion: int = 4
    span: int | None = None

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
            setattr(self, field.name, _checked(field.name, getattr(self, field.name), field.type))
        if self.width % self.n_heads:
            raise ValueError(
                f"the width must be a multiple of the heads; got width={self.width}, n_heads={self.n_heads}"
            )
        if self.span is not None:
            if not isinstance(self.span, Integral) or isinstance(self.span, bool) or not 0 <= self.span < 2**31:
                raise ValueError(f"span must be a number of tokens, 0 or more, or None; got {self.span!r}")
            self.span = int(self.span)

    @property
    def n_neurons(self) -> int:
        """h, the neurons of each layer."""
        return self.expansion * self.width

    @classmethod
    def preset(cls, name: str, **overrides) -> Self:
        """The paper's sizes "1L", "2L", "3L", "S", "B", and "toy" for a laptop; any field may be overridden.

        Raises:
            ValueError: there is no preset `name`.
        """
        if name not in cls.presets:
            raise ValueError(f"no preset {name!r}; there are {', '.join(cls.presets)}")
        return cls(**cls.presets[name] | overrides)


def _checked(name: str, value: object, kind: type) -> object:
    """`value` as an int, float, bool or str, whichever a field is of; other fields check themselves."""
    if kind is int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer; got {value!r}")
        if not 1 <= value < 2**31:
            raise ValueError(f"{name} must be at least 1{' and below 2**31' if value > 1 else ''}; got {value}")
        return int(value)
    if kind is float:
        if not isinstance(value, Real) or isinstance(value, bool) or not -1e18 <= value <= 1e18:
            raise ValueError(f"{name} must be a finite number, of at most 1e18; got {value!r}")
        return float(value)
    if kind in (bool, str) and not isinstance(value, kind):
        raise ValueError(f"{name} must be {'true or false' if kind is bool else 'a text'}; got {value!r}")
    return value


class LanguageModel(nn.Module):
    """Tokens in, next-token logits out (eq-05-2). Subclasses say what a block is and how it starts.

    A block takes (x, cache, position) with x (b, n, d), has an `attention` with the attribute `cache_tensors`, and a
    `neurons` identity through which its (b, n, h) neuron activations pass: hook that site to record or to steer.

    Raises:
        ValueError: the device has less memory in all than the parameters take.
    """

    config_class: ClassVar[type[LanguageModelConfig]]

    def __init__(self, config: LanguageModelConfig, block: type[nn.Module], norm: Callable[[], nn.Module]):
        super().__init__()
        _check_memory(config, block)
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = norm()

    def forward(self, tokens: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (b, n) integers below `vocab_size`, n at most `context`.
            cache: from `new_cache`; filled in place.
            position: how many tokens the cache already holds. From there on tokens come one at a time.

        Returns:
            (b, n, v).

        Its gradient may be differentiated again by `torch.func`; by `create_graph=True` under
        `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, since PyTorch's fast attention has first derivatives alone.

        Raises:
            ValueError: the tokens are not (b, n) integers, reach past the context, or follow a cache in bulk; on the
                CPU also if one is not in the vocabulary, which a GPU reports in a way of its own.
        """
        generation.check_tokens(tokens)
        n = tokens.shape[1]
        if position + n > self.config.context:
            raise ValueError(f"the context is {self.config.context} tokens; got {position + n}: crop them to the last")
        if position < 0 or (position and (cache is None or n > 1)):
            with_cache = "without a cache" if cache is None else "with one"
            raise ValueError(
                f"position > 0 needs a cache and takes one token at a time; got {n} at {position} {with_cache}"
            )
        try:
            x = self.token_embedding(tokens)
        except IndexError as error:
            raise ValueError(f"tokens must lie in [0, {self.config.vocab_size}); some do not") from error
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

    generate = generation.generate

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

    @classmethod
    def with_weights(cls, config: LanguageModelConfig, weights: Mapping[str, Tensor], source: str | Path) -> Self:
        """A new model that holds `weights`, in evaluation mode; nothing is allocated before they are found to fit.

        Args:
            config: of the model.
            weights: as `renamed` gives them.
            source: where they come from, for messages.

        Raises:
            ValueError: `config` is larger than memory, or keys are missing, left over or of another shape.
        """
        try:
            own = _outline(lambda: cls(replace(config, n_layers=1)), config).state_dict()
            block = [name.removeprefix("blocks.0.") for name in own if name.startswith("blocks.0.")]
            held = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
            for i in range(1, min(config.n_layers, held + 1)):  # one more than there are is enough to be missed
                own |= {f"blocks.{i}.{name}": own[f"blocks.0.{name}"] for name in block}
            check_shapes(weights, own, config)
            model = cls(config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        model.load_state_dict(weights)
        return model.eval()


def _outline(make: Callable[[], nn.Module], config: LanguageModelConfig) -> nn.Module:
    """What `make` returns, as shapes without memory."""
    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:  # more numbers than 64 bits can count
        raise ValueError(f"{config} is larger than any memory: {error}") from error


_OBJECTS = 20_000  # bytes of Python's objects that make up a block, at least


def _check_memory(config: LanguageModelConfig, block: type[nn.Module]) -> None:
    place, needed = torch.empty(0), config.n_layers * _OBJECTS
    of_block = sum(parameter.numel() for parameter in _outline(lambda: block(config), config).parameters())
    numbers = (config.vocab_size + config.context) * config.width + config.n_layers * of_block
    if type(place) is Tensor and not place.is_meta:  # else shapes alone are wanted
        needed += numbers * place.element_size()
    room = memory(place.device)
    if needed > room:
        raise ValueError(
            f"{config} has {numbers:,} parameters, which take {needed / 2**30:,.1f} GiB; "
            f"this machine has {room / 2**30:,.1f} GiB in all"
        )
