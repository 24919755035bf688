"""Corpora: documents with `text` and `meta`."""

from cratelab.corpora import pydocs

__all__ = ["pydocs"]
