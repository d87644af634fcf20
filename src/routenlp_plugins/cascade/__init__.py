"""Bounds, policy search and certificates."""
