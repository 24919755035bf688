"""Corpora: documents with `text` and `meta`, their tokens on disk, and TinyWorld, whose every token is labelled."""

from cratelab.corpora import documents, files, hub, pydocs, tinyworld, token_store, token_writer, tokenizers

__all__ = ["documents", "files", "hub", "pydocs", "tinyworld", "token_store", "token_writer", "tokenizers"]
