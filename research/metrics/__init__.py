"""Metrics of texts and programs, and how sure one may be of their means."""
