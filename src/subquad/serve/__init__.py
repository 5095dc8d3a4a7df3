"""Serving over HTTP: an OpenAI-compatible server over the decode engine."""
