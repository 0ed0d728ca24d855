"""Experiments that are never done twice, and the processes and machines that do them."""
