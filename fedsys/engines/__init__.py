"""Engines: each is a Flower Grid, and only a transport."""
