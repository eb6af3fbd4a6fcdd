"""Checked execution of an experiment's notebooks."""
