"""The worker process of an instance, and its supervisor."""
