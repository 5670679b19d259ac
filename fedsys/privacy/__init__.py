"""Differential privacy: what a run guarantees, and what an attack on it finds."""
