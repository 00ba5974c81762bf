"""Comparisons with other ways to serve the same models, under the same load in the same run."""
