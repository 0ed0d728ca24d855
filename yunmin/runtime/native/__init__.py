"""The compiled CPU runtime: a whole prefill chunk or decode step in one native call."""
