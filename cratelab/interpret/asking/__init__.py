"""Asking language models: endpoints, prompts, and answers that are never paid for twice."""
