"""Where the checkout's files are."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
