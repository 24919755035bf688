"""What makes the book's tables: comparisons, reference models, statistics; one module a chapter."""
