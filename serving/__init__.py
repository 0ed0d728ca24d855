"""Artifact in, tokens over HTTP out."""
