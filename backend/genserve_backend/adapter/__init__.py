"""Adapter between Triton and the engines: the only code that imports Triton's module. Does not import torch."""
