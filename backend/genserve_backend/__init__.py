"""The engine room of GenServe: what the Triton models run, without Triton itself."""
