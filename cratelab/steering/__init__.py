"""Steering: neurons edited while a model computes, the tokens that this raises and lowers, and its price."""

from cratelab.reading import neuron_maxima
from cratelab.steering.continuations import generate_when_set, repetition
from cratelab.steering.cost import STRENGTHS, Frontier, frontier
from cratelab.steering.edits import Edit, steer
from cratelab.steering.effects import atoms, direct_effect, full_effect, steered_logits
from cratelab.steering.targets import control_tokens, draw_live, most_raised, neuron_that_raises_most, token_counts

__all__ = [
    "STRENGTHS",
    "Edit",
    "Frontier",
    "atoms",
    "control_tokens",
    "direct_effect",
    "draw_live",
    "frontier",
    "full_effect",
    "generate_when_set",
    "most_raised",
    "neuron_maxima",
    "neuron_that_raises_most",
    "repetition",
    "steer",
    "steered_logits",
    "token_counts",
]
