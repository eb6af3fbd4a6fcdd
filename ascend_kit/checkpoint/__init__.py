"""Checkpoints: files in, files out. Knows tensor names, layouts and hashes; knows neither engine nor
device.
"""
