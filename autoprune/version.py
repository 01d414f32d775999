"""The version of the installed package, as its metadata says."""

from importlib.metadata import version

__version__ = version("autoprune")
