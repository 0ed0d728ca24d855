"""Speed, memory and efficiency, measured."""
