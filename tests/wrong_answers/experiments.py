"""Wrong answers to every open experiment: what its check says -> an experiment with that mistake."""

import math

import torch

WRONG_EXPERIMENTS = {
    "two runs of experiment": lambda seed: {"found": float(torch.rand(())), "control": 0.0},
    'has no "control"': lambda seed: {"found": float(seed), "also found": 0.0},
    "is the seed used": lambda seed: {"found": 1.0, "control": 0.0},
    "is the same thing measured twice": lambda seed: {"found": float(seed), "control": float(seed)},
    r"'found' is \[1\.0, 2\.0\]; a finite number is needed": lambda seed: {"found": [1.0, 2.0], "control": float(seed)},
    r"'found' is tensor\(.*; a finite number is needed": lambda seed: {"found": torch.ones(3), "control": float(seed)},
    "'found' is '1.0'; a finite number is needed": lambda seed: {"found": "1.0", "control": float(seed)},
    "'found' is nan; a finite number is needed": lambda seed: {"found": math.nan, "control": float(seed)},
    "returns other names under another seed": lambda seed: {f"run {seed}": float(seed), "control": 0.0},
}
