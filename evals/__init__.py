"""Benchmark tasks, scorers, statistics and the report."""
