"""Models as folders that Hugging Face `transformers` loads, without cratelab."""

from cratelab.huggingface.export import to_huggingface

__all__ = ["to_huggingface"]
