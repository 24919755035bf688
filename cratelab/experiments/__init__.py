"""What makes the book's tables: comparisons and reference models; one module a chapter."""
