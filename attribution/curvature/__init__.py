"""Approximations of the loss's curvature, made of gradients, and their inverses."""
