"""Pages a person reads: text made safe, and the shell that every page stands in."""
