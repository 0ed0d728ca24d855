"""What models are asked to do, and where the questions come from."""
