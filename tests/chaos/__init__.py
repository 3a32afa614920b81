"""A crash campaign against the relay: blows at random moments, and a verdict after each round."""
