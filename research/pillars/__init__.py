"""Each pillar against its honest baseline, at equal budget; `python -m research.pillars` runs the comparisons."""
