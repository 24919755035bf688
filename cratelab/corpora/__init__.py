"""Corpora: documents with `text` and `meta`, and TinyWorld, whose every token is labelled."""

from cratelab.corpora import pydocs, tinyworld

__all__ = ["pydocs", "tinyworld"]
