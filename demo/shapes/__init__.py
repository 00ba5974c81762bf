"""A small world of coloured shapes: scenes, their captions, their pictures, and a reader of pictures."""
