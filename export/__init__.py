"""Run folder or checkpoint in, verified artifact out."""
