"""Measurements of one property each: priority, fairness, faults, padding, quality."""
