"""Ways to decode faster: what guesses tokens for the engine to verify."""
