"""Run every combination of the three pillars over a grid, and report what each is worth."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """`yunmin ablate`."""
    raise NotImplementedError
