"""What the two crash campaigns share."""
