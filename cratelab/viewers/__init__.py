"""Pages to look at neurons and to push them: HTML, escaped and self-contained."""
