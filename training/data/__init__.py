"""One file per source of training text."""
