"""The machine: device selection, operators, captured graphs. No floor above this one names a vendor."""
