"""What models are worth: evaluation tasks, and later studies and reports."""
