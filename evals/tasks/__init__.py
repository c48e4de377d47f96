"""The room for benchmark tasks, one declarative file each; empty for now."""
