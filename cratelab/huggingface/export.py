"""A model written as a folder that `transformers` loads where there is no cratelab, tokenizer and code included."""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cratelab.crate import Crate
from cratelab.extras import require
from cratelab.gpt2 import Gpt2
from cratelab.huggingface.card import model_card
from cratelab.huggingface.tokenizer import to_transformers
from cratelab.language_model import LanguageModel
from cratelab.storage import locked, remove_leftovers, replacing, write_text
from cratelab.weights import check_numbers

if TYPE_CHECKING:
    import tiktoken
    import tokenizers
    from transformers import PreTrainedModel

    from cratelab.corpora.tokenizers import WordEncoding

_ROLES = "bos_token_id", "eos_token_id", "pad_token_id"
_AUTO_CLASSES = {"AutoConfig": "CrateConfig", "AutoModel": "CrateModel", "AutoModelForCausalLM": "CrateForCausalLM"}
_MODELING = "huggingface.modeling_crate"
_NOTICE = "# Copyright (c) 2026 the cratelab authors, MIT licence: https://opensource.org/license/mit\n"
_OWN_IMPORT = re.compile(r"^from cratelab\.([\w.]+) import", re.MULTILINE)


def to_huggingface(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: "tokenizers.Tokenizer | tiktoken.Encoding | WordEncoding | None" = None,
    card: str | None = None,
) -> None:
    """Write a model, whole or not at all, as a folder for `AutoModelForCausalLM` and `PreTrainedTokenizerFast`.

    CRATE comes with its code: the receiver needs torch, einops and transformers (5.8), says `trust_remote_code=True`,
    and finds the neurons of layer i at `model.blocks.i.neurons`. GPT-2 becomes `transformers`' own, without code: its
    biases are 0 where this one has none, so both compute the same function. `cratelab.load` reads either back. The
    tokenizer is data; `AutoTokenizer` reads it too, but first asks whether to run the model's code, in vain.

    A vocabulary is often padded beyond the tokenizer's; generation_config.json suppresses what no text becomes.

    Args:
        model: a `Crate` or a `Gpt2`, written in the precision that it is in.
        folder: new or empty.
        tokenizer: what the model reads; one of `cratelab.corpora.tokenizers`, or of the libraries `tiktoken` or
            `tokenizers`. The folder holds none unless given.
        card: its README.md, as `cratelab.huggingface.card.model_card` makes it of a run; unless given it says that
            nothing is known about the training.

    Raises:
        ImportError: `transformers` is not installed.
        TypeError: the model or the tokenizer is of another kind.
        ValueError: `folder` is not empty, or the current one; the tokenizer has tokens that the model does not know, or
            the library `tokenizers` cannot do as it does; weights are not finite; or this GPT-2 has a `span` or
            `top_k`, which `transformers`' has not.
        BlockingIOError: another process is exporting to the same place.
        OSError: it cannot be written.
    """
    require("transformers", "transformers")
    folder = Path(folder).resolve()  # of a link, what it points to
    check_new(folder)
    check_numbers(model.state_dict(), type(model).__name__)
    fast = None if tokenizer is None else to_transformers(tokenizer, model.config.context)
    theirs = _as_theirs(model, {role: getattr(fast, role, None) for role in _ROLES})
    if fast is not None:
        _suppress_what_no_text_becomes(theirs, set(fast.get_vocab().values()))
    with _only_writer(folder), replacing(folder) as part:
        theirs.save_pretrained(part)
        if fast is not None:
            fast.save_pretrained(part)
        for name, source in (_code() if isinstance(model, Crate) else {}).items():
            write_text(part / name, source)
        write_text(part / "README.md", card or model_card(model, folder.name, {}))
        if folder.is_dir():
            folder.rmdir()  # it is empty; not every system replaces a folder by another


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Nobody else exports to `folder` meanwhile; what a killed export has left beside it is removed."""
    lock = folder.with_name(f".{folder.name}.cratelab-export")
    with locked(lock, f"another process is exporting to {folder}: wait until it has ended, or choose another folder"):
        try:
            remove_leftovers(folder.parent, glob.escape(folder.name))
            check_new(folder)  # another has perhaps ended since
            yield
        finally:
            with suppress(OSError):  # Windows does not remove what is open
                lock.unlink()


def check_new(folder: Path) -> None:
    """Raises ValueError unless the folder is empty or not there, and another than the one that commands run in."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another")
    if folder.exists() and folder.samefile(Path()):
        raise ValueError(f"{folder} is the current folder, which cannot be replaced: choose another")


def _as_theirs(model: LanguageModel, special: dict[str, int | None]) -> "PreTrainedModel":
    """The class of `transformers` with the configuration and weights of the model, in its precision."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if type(model) is Crate:  # a subclass may compute something else
        from cratelab.huggingface.modeling_crate import CrateConfig, CrateForCausalLM

        kind, config = CrateForCausalLM, CrateConfig(**asdict(model.config), **special)
        config.auto_map = {auto: f"{_MODELING.split('.')[-1]}.{name}" for auto, name in _AUTO_CLASSES.items()}
    elif type(model) is Gpt2:
        from transformers import GPT2Config, GPT2LMHeadModel

        kind, config = GPT2LMHeadModel, GPT2Config(**model.huggingface_config(), **special)
        weights = model.huggingface_weights()
    else:
        raise TypeError(f"only Crate and Gpt2 have a form in transformers; got {type(model).__name__}")
    with torch.random.fork_rng():
        theirs = kind(config).to(model.token_embedding.weight.dtype)
    theirs.load_state_dict(weights | {"lm_head.weight": model.token_embedding.weight})
    return theirs


def _suppress_what_no_text_becomes(theirs: "PreTrainedModel", tokens: set[int]) -> None:
    known = set(range(theirs.config.vocab_size))
    if beyond := tokens - known:
        raise ValueError(f"the tokenizer has token {max(beyond)}, and the model knows {len(known)} tokens, from 0 on")
    if known - tokens:
        theirs.generation_config.suppress_tokens = sorted(known - tokens)


def _code() -> dict[str, str]:
    """The modelling module and those of cratelab that it needs, by file name, one importing the other beside it."""
    code, left = {}, [_MODELING]
    while left:
        module = left.pop()
        file = module.split(".")[-1] + ".py"
        if file not in code:
            source = files("cratelab").joinpath(*module.split(".")[:-1], file).read_text(encoding="utf8")
            left += _OWN_IMPORT.findall(source)
            code[file] = _NOTICE + _OWN_IMPORT.sub(r"from .\1 import", source)
    return code
