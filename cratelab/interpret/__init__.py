"""What neurons mean: records of what they do, explanations, simulations of these, and scores (chapters 8 and 9)."""
