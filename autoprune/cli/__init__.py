"""Rooms are described once all of them stand."""

from autoprune.cli.main import main

__all__ = [
    "main",
]
