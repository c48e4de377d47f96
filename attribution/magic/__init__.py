"""Token scores by differentiation through a whole training run (MAGIC, arXiv 2504.16430)."""
