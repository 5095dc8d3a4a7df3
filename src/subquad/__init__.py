"""Hybrids of attention and linear recurrences: convert, prove, generate."""

__version__ = "0.1.0"
