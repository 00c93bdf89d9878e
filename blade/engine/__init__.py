"""Ids and the device: the engine thread and what runs in it."""
