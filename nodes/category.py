"""The menu group of all nodes of the pack."""

CATEGORY = "Mochi"
