"""Training of reward heads by pairwise preferences, and their evaluation on held-out pairs."""
