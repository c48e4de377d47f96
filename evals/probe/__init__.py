"""Probes: what a model's hidden states tell about a token, layer by layer."""
