"""Model files: finding them, reading them."""
