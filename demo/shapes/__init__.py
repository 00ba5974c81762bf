"""A small world of coloured shapes: scenes, captions, pictures, and the recognition of pictures."""
