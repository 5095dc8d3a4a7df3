"""Benches of the decode engine."""
