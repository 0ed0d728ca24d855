"""Weights in int8 and int4: their layout in files, rounding, and the network that runs on them in torch."""
