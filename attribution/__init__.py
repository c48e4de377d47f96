"""Gradient sinks, projections, stores, scores and selection."""
