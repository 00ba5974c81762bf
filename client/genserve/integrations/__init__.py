"""Adapters to other frameworks. Each needs that framework's core package: ``pip install 'genserve[NAME]'``."""
