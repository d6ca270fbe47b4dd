"""Measuring samplers: the bench, its metrics and the peers it compares with."""
