"""Rooms are described once all of them stand."""
