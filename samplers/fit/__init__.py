"""Fitting plans, their times and their numbers, to a network."""
