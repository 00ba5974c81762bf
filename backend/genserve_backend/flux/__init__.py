"""Text to image with FLUX."""
