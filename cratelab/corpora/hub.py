"""Corpora of the Hugging Face hub, streamed: The Pile, TinyStories, WikiText and any other with a text field.

Nothing is downloaded whole; reading the first thousand documents of The Pile moves a few megabytes. Files that are
already on this machine are read by `cratelab.corpora.files`, which needs no network.
"""

import os
from collections.abc import Iterator

from cratelab.corpora.documents import Document
from cratelab.corpora.files import as_document
from cratelab.extras import require

PILE = "monology/pile-uncopyrighted"
TINY_STORIES = "roneneldan/TinyStories"
WIKITEXT = "Salesforce/wikitext"


class HubDocuments:
    """The documents of a data set on the hub, streamed anew each time they are iterated.

    Args:
        path: the data set, such as "monology/pile-uncopyrighted", or a folder that `datasets` can read.
        name: its configuration, where it has several.
        split: "train", "validation" or "test", where it has them.
        text: the field that holds the text.
        domain: `meta["domain"]` of rows that name none; the data set's name unless given.

    Raises:
        ImportError: the package `datasets` is not installed.
        ConnectionError: while reading, the hub cannot be reached; the message says what to do.
        ValueError: while reading, there is no such data set, configuration or split, or a row has no text.
    """

    def __init__(
        self, path: str, name: str | None = None, split: str = "train", text: str = "text", domain: str | None = None
    ):
        require("datasets")
        self.path, self.name, self.split, self.text = os.path.expanduser(path), name, split, text
        self.domain = domain or path.rstrip("/").split("/")[-1]

    def __iter__(self) -> Iterator[Document]:
        try:
            rows = require("datasets").load_dataset(self.path, self.name, split=self.split, streaming=True)
            for number, row in enumerate(rows, 1):
                try:
                    document = as_document(row, self.text, self.domain)
                except ValueError as error:
                    raise ValueError(f"row {number} of {self.path} ({self.split}) {error}") from None
                yield document
        except Exception as error:
            not_cached = require("huggingface_hub.errors").LocalEntryNotFoundError  # a file is missing, but offline
            if isinstance(error, FileNotFoundError) and not isinstance(error, not_cached):
                raise ValueError(
                    f"{error}. Check the name {self.path!r} and the configuration {self.name!r}"
                ) from error
            if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
                raise
            raise ConnectionError(
                f"the data set {self.path!r} cannot be read from the Hugging Face hub: {error}. Connect this machine "
                f"and unset HF_HUB_OFFLINE; or where there is a network run `hf download {self.path} --repo-type "
                "dataset --local-dir FOLDER`, copy FOLDER here and read it by "
                "cratelab.corpora.files.LocalDocuments(FOLDER); or take a corpus that is on every machine: "
                "cratelab.corpora.pydocs"
            ) from error


def pile(split: str = "train") -> HubDocuments:
    """The Pile without its copyrighted subsets; `meta["domain"]` is `meta["pile_set_name"]`, the subset."""
    return HubDocuments(PILE, split=split)


def tiny_stories(split: str = "train") -> HubDocuments:
    """TinyStories (Eldan & Li, 2023): short stories in the words of a small child. Splits: train, validation."""
    return HubDocuments(TINY_STORIES, split=split)


def wikitext(split: str = "train", name: str = "wikitext-103-raw-v1") -> HubDocuments:
    """WikiText (Merity et al., 2016), one document for each line of an article, empty ones included."""
    return HubDocuments(WIKITEXT, name, split)
