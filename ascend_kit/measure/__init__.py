"""Measuring: workloads, metrics, costs, ceilings and the sweep that joins them."""
