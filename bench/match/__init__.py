"""Capacity in the open: what mixers cost under a protocol, and which of their values meet one budget.

Every figure is counted on the model that a run builds, on the meta device: no data, no training, nothing drawn. Nothing
is adjusted silently either: the table shows what moved, from where, and what is missed.
"""
