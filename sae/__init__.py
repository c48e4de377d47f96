"""Sparse autoencoders: encoders, training, fingerprints."""
