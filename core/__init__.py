"""Models and plumbing; knows no task and imports nothing of ours."""
