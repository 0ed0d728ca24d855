"""Speed, memory and size, alone and against one another."""
