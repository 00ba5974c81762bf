"""Simulated device: the real Triton, stub, worker and FLUX engine around steps that only take time."""

STEP_ENV = "SIMULATED_STEP_S"
"""Environment variable of the worker: seconds that a forward takes per batch row."""
