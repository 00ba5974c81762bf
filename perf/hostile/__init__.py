"""Hostile requests to a gateway: generated ones, mangled JSON, and raw bytes."""
