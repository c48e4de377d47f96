"""What fingerprints tell of attribution: labels, splits, predictors, the verdict, its use."""
