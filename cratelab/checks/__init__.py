"""Checks of the exercises: one module a chapter, one function an exercise, which takes the reader's function.

Each compares answers on random double-precision inputs with an oracle that computes them in another way, and names the
mistake that explains the difference.
"""
