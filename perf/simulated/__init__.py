"""Simulated devices: the real Triton, stubs, workers and FLUX engine around parts that only take time, or a model of
them on a virtual clock. Whatever they print is simulated."""

DEVICE_ENV = "SIMULATED_DEVICE"
"""Environment variable of the worker: the text that `simulated.device.Device.load` takes."""
