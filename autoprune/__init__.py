"""Prune a trained network to a target, unattended."""
