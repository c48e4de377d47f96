"""Benchmarks, a declarative file for each or for a family of them; `evals.catalogue` reads them."""
