"""Training by score matching: data, objective, trainer."""
