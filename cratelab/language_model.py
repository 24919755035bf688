"""The trunk that CRATE and GPT-2 share: embeddings, pre-norm blocks, tied head, generation with a cache, files.

Notable: learned positions, weight tying without a second tensor, one named site `block.neurons` in every block, and a
cache that asks each attention how many tensors it has to remember (one for MSSA, two for attention).
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cratelab.devices import all_finite, memory
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

    Raises:
        ValueError: a field is of another type than stated or out of its range, or the heads do not divide the width.
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
            setattr(self, field.name, _checked(field.name, getattr(self, field.name), field.type))
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
        _check_tokens(tokens)
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
            temperature: divides the logits; 0 takes the most likely token, the first of several.
            top_k: sample among the k most likely tokens only; of equally likely ones the first count.
            seed: 0 to 2³² − 1, makes the draw repeatable; without it torch's global generator is used.
            stop: a token that ends its row; the row is filled up with it, and all rows done ends the call.
            n_vocab: tokens that the corpus knows, where the model's vocabulary is padded; none beyond is sampled.

        Returns:
            (b, n + at most n_new), prompts included.

        Past the context the cache is of no use, since positions are learned: the last window is then encoded anew for
        every token, and a warning says so.

        Raises:
            ValueError: a prompt is empty, a token is not in the vocabulary, an option is out of range, or the logits
                are not finite.
        """
        _check_tokens(tokens)
        _check_options(self.config.vocab_size, n_new, temperature, top_k, seed, stop, n_vocab)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(
                f"tokens must lie in [0, {self.config.vocab_size}); got {int(tokens.min())} to {int(tokens.max())}"
            )
        context = self.config.context
        if tokens.shape[1] + n_new - 1 > context:
            warnings.warn(
                f"{tokens.shape[1] + n_new} tokens do not fit the context of {context}: "
                "past it the last window is encoded anew for every token",
                stacklevel=2,
            )
        tokens = tokens.to(self.token_embedding.weight.device)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(int(seed))
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
            ValueError: keys are missing, left over or of another shape, or tensors hold something else than finite
                floating-point numbers; each is named, with `source`.

        Numbers of another precision are converted to that of the parameters; the names may be those of a compiled or
        distributed model.
        """
        weights = renamed(weights, str, source)
        try:
            _check_shapes(weights, self.state_dict(), self.config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        self.load_state_dict(weights)

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
            _check_shapes(weights, own, config)
            model = cls(config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        model.load_state_dict(weights)
        return model.eval()


def load(folder: str | Path) -> LanguageModel:
    """The model that `save` wrote into `folder`, on the CPU, in evaluation mode and in float32 whatever the file holds.

    Raises:
        FileNotFoundError: `folder` holds no config.json or model.safetensors.
        ValueError: config.json describes no known model, or the weights do not fit it, each misfit by name.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        hint = f": give {folder / 'model'}" if (folder / "model" / "config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} holds no model, since there is no config.json in it{hint}")
    config = read_json(folder / "config.json")
    name = config.pop("model", None)
    import cratelab.crate  # for __subclasses__
    import cratelab.gpt2  # noqa: F401

    classes = {subclass.__name__: subclass for subclass in LanguageModel.__subclasses__()}
    model_class = classes.get(str(name))
    if model_class is None:
        raise ValueError(f"{folder / 'config.json'} names the model {name!r}; known are {', '.join(sorted(classes))}")
    known = {field.name for field in fields(model_class.config_class)}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"{folder / 'config.json'} has settings that {name} does not know, perhaps of a newer cratelab: "
            f"{', '.join(unknown)}"
        )
    try:
        config = model_class.config_class(**config)
    except (TypeError, ValueError) as error:  # a field is missing, or of a wrong type or value
        raise ValueError(f"{folder / 'config.json'} does not fit {name}: {error}") from error
    weights = folder / "model.safetensors"
    return model_class.with_weights(config, renamed(read_tensors(weights), str, weights), weights)


def renamed(weights: Mapping, rename: Callable[[str], str | None], source: str | Path) -> dict[str, Tensor]:
    """Weights from elsewhere under our names; those of which `rename` makes None are left out.

    The prefixes of PyTorch's DDP and compiled modules, `module` and `_orig_mod`, are gone before `rename` sees a name.

    Raises:
        ValueError: a name is no text, two become one, or a tensor holds something else than finite floating-point
            numbers.
    """
    own = {}
    for key, tensor in weights.items():
        if not isinstance(key, str):
            raise ValueError(f"{source}: a tensor must be named by a text; got {key!r}")
        name = rename(".".join(part for part in key.split(".") if part not in ("module", "_orig_mod")))
        if name in own:
            raise ValueError(f"{source} holds {name} twice, once as {key}")
        if name is not None:
            own[name] = tensor
    check_numbers(own, source)
    return own


_PRECISIONS = torch.float16, torch.bfloat16, torch.float32, torch.float64  # those of 8 bits come with factors beside


def check_numbers(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse what is no plain tensor of finite floating-point numbers, finite also in the default dtype.

    Raises:
        ValueError: naming `source` and each tensor.
    """

    def problem(tensor: object) -> str | None:
        if not isinstance(tensor, Tensor):
            return f"is {type(tensor).__name__}, expected a tensor"
        if tensor.dtype not in _PRECISIONS:
            return f"is {tensor.dtype}, expected float16, bfloat16, float32 or float64"
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            return "is sparse, nested or without its numbers, expected a plain tensor"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"is {tuple(tensor.shape)}, more than the file holds"
        wrong = tensor.numel() - int(tensor.to(torch.get_default_dtype()).isfinite().sum())
        return f"holds {wrong} numbers that are not finite" if wrong else None

    problems = [f"{name} {said}" for name, tensor in weights.items() if (said := problem(tensor))]
    if problems:
        raise ValueError(f"{source} holds no usable weights:{_listed(problems)}")


def drop_tied_head(weights: dict[str, Tensor], source: Path) -> None:
    """Remove lm_head.weight, which files from elsewhere hold beside the embedding that it is, or instead of it.

    Raises:
        ValueError: it is not the embedding.
    """
    head = weights.pop("lm_head.weight", None)
    if head is None:
        return
    embedding = weights.setdefault("token_embedding.weight", head)
    if head.shape != embedding.shape or not head.double().equal(embedding.double()):
        raise ValueError(
            f"{source}: lm_head.weight differs from the token embedding (wte.weight), but the two are tied"
        )


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens must be (b, n), n at least 1, of int32 or int64; got {tokens.dtype} {tuple(tokens.shape)}"
        )


def _check_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], config: LanguageModelConfig) -> None:
    problems = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in weights]
    problems += [f"unexpected {name} {tuple(weights[name].shape)}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"the weights do not fit {config}:{_listed(problems)}")


def _listed(problems: list[str], most: int = 50) -> str:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {line}" for line in problems[:most] + more)


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


def _check_options(
    vocab_size: int,
    n_new: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    stop: int | None,
    n_vocab: int | None,
) -> None:
    """What `generate` is asked for, before it starts."""

    def check(name: str, value: object, low: int, high: float, kind: type = Integral) -> None:
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value < high:
            raise ValueError(f"generate needs {low} <= {name} < {high}; got {name}={value!r}")

    check("n_new", n_new, 0, torch.inf)
    check("temperature", temperature, 0, torch.inf, Real)
    if top_k is not None:
        check("top_k", top_k, 1, torch.inf)
    if seed is not None:
        check("seed", seed, 0, 2**32)
    if n_vocab is not None:
        check("n_vocab", n_vocab, 1, vocab_size + 1)
    if stop is not None:
        check("stop", stop, 0, vocab_size if n_vocab is None else n_vocab)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    highest = logits.amax(-1, keepdim=True)
    if not all_finite(highest):
        raise ValueError("the logits are not finite: the model's weights are not, or activations overflowed")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        out = logits < least
        if out.sum() < out.numel() - top_k * len(out):  # too many are left: some are equal
            equal, room = logits == least, top_k - (logits > least).sum(-1, keepdim=True)
            out |= equal & (equal.cumsum(-1) > room)
        logits = logits.masked_fill(out, -torch.inf)
    # The highest becomes 0, which a temperature near 0 leaves as it is while all others go to −∞.
    scaled = (logits - highest).float() * min(1 / temperature, torch.finfo(torch.float32).max)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)
