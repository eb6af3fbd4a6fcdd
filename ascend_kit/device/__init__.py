"""The machine: device selection, operators, captured graphs, parallel groups. Nothing above this floor names a vendor."""
