"""What is asked: benchmarks as TOML files, how these are read, and how items become prompts."""
