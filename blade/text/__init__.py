"""Text to ids and back, on the loop thread."""
