"""The ablation study: every combination of the three pillars, over a grid, and what it says."""
