"""Backend of GenServe: the engines, their worker processes, and the adapter to Triton."""
