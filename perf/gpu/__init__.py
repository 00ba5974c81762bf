"""Measurements of GenServe on a GPU, in three calls of a few minutes each."""
