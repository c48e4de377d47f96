"""The page that people read: of an experiment's arms, of scores, of MAGIC's tokens."""
