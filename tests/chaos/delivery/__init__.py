"""A crash campaign against the consumers: deaths at named points, and books after each round."""
