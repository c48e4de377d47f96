"""Whether scores are true: retraining without rows, retrieval of known causes, and controls."""
