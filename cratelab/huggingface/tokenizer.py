"""Tokenizers as `transformers` has them, of the same ids.

A `tiktoken.Encoding` holds ranks, a `tokenizers.Tokenizer` merges: the merge that made a token is found by taking the
token apart with all merges of lower rank, which leaves two pieces. What comes out is compared on odd text.
"""

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from cratelab.corpora.tokenizers import END_OF_TEXT, WordEncoding, byte_characters
from cratelab.extras import require

if TYPE_CHECKING:
    import tiktoken
    import tokenizers
    from transformers import PreTrainedTokenizerFast

ODD_TEXT = (
    "Don't  STOP\u2019s we\u2019ll 1999,5 \t\n\n  x\r\n\u00a0\u2003 naïve ñ 漢字、テスト。 Ελλάδα العربية עברית "
    "👩\u200d👩\u200d👧 e\u0301 \x00\x7f\ufeff \u2028 a$5 ---!!!  aaaaaaaaaaa 00000000  def f(self):\n        pass   "
)


def to_transformers(
    tokenizer: "tokenizers.Tokenizer | tiktoken.Encoding | WordEncoding", context: int
) -> "PreTrainedTokenizerFast":
    """The tokenizer with ids unchanged; its end of text also begins a text and fills up short ones, on the left.

    As everywhere in `transformers`, the name of the end of text within a text is read as that token, which
    `encode_ordinary` does not do; `split_special_tokens=True` changes that.

    Args:
        tokenizer: one of `cratelab.corpora.tokenizers`, or of the libraries `tiktoken` or `tokenizers`.
        context: tokens that the model sees at once.

    Raises:
        ImportError: `transformers` is not installed.
        TypeError: it is no such tokenizer.
        ValueError: `tokenizers` would read other tokens in some text, as with a pattern that it does not know.
    """
    transformers, library = require("transformers", "transformers"), require("tokenizers")
    if isinstance(tokenizer, library.Tokenizer):
        fast, end = tokenizer, END_OF_TEXT if tokenizer.token_to_id(END_OF_TEXT) is not None else None
    elif isinstance(tokenizer, WordEncoding):
        fast, end = _words(tokenizer), tokenizer.vocabulary[tokenizer.eot_token]
    elif hasattr(tokenizer, "_mergeable_ranks"):
        fast, end = _byte_level(tokenizer), END_OF_TEXT if END_OF_TEXT in tokenizer._special_tokens else None
    else:
        raise TypeError(
            f"no tokenizer that can be exported: {type(tokenizer).__name__}; give one of cratelab.corpora.tokenizers, "
            "a tiktoken.Encoding or a tokenizers.Tokenizer"
        )
    roles = {} if end is None else dict(bos_token=end, eos_token=end, pad_token=end)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _words(words: WordEncoding) -> "tokenizers.Tokenizer":
    library = require("tokenizers")
    fast = library.Tokenizer(library.models.WordLevel(words._index))
    fast.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    return fast


def _byte_level(encoding: "tiktoken.Encoding") -> "tokenizers.Tokenizer":
    library, characters = require("tokenizers"), byte_characters()

    def name(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = encoding._mergeable_ranks
    vocabulary = {name(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [tuple(map(name, _parents(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    fast = library.Tokenizer(library.models.BPE(vocabulary, merges))
    try:
        fast.pre_tokenizer = _pre_tokenizer(encoding._pat_str)
    except Exception as error:  # which is all that the library says it is
        raise ValueError(
            f"the library tokenizers does not know the pattern of {encoding.name!r}, {encoding._pat_str!r}: {error}; "
            "give a tokenizers.Tokenizer"
        ) from error
    fast.decoder = library.decoders.ByteLevel()
    fast.add_special_tokens(list(encoding._special_tokens))
    for text in (ODD_TEXT, ODD_TEXT.strip()):
        if fast.encode(text).ids != encoding.encode_ordinary(text) or fast.decode(fast.encode(text).ids) != text:
            raise ValueError(
                f"the library tokenizers would read other tokens than {encoding.name!r} does, as its patterns are "
                f"others than tiktoken's: {encoding._pat_str!r}; give a tokenizers.Tokenizer"
            )
    return fast


def _parents(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge is `token`: what all merges of lower rank leave of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        if min(merged) >= ranks[token]:
            raise ValueError(f"no merge of two tokens makes the token {token!r}: its ranks are not those of a BPE")
        i = merged.index(min(merged))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _pre_tokenizer(pattern: str) -> "tokenizers.pre_tokenizers.PreTokenizer":
    library = require("tokenizers").pre_tokenizers
    # There "$" is the end of a line, and "{1,3}+" is not possessive, but as many times one to three as there are.
    ends = re.sub(r"\\.|\[(?:\\.|[^\]])+\]|\$", lambda found: r"\z" if found[0] == "$" else found[0], pattern)
    theirs = re.sub(r"(\{\d+,\d+\})\+", r"\1", ends)
    split = library.Split(require("tokenizers").Regex(theirs), "isolated")
    return library.Sequence([split, library.ByteLevel(add_prefix_space=False, use_regex=False)])
