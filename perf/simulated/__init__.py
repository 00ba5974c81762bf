"""Simulated devices, and whatever is printed of them is simulated.

Either the real Triton, stubs, workers and FLUX engine are around parts that only take time, or a model of them runs on
a virtual clock.
"""

DEVICE_ENV = "SIMULATED_DEVICE"
"""Environment variable of the worker: the text that `simulated.device.Device.load` takes."""
