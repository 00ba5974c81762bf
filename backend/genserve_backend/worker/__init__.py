"""The worker process of an instance, and the supervisor that watches it."""
