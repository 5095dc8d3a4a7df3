"""Benches of the ways to decode."""
