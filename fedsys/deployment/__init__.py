"""Deployment: a server and devices that belong to others, on Flower's SuperLink and SuperNodes."""
