"""Between Triton and the engines: the only code that imports Triton's module, and it imports no torch."""
