"""The engine: sequences that advance together. It knows token ids and states, neither text nor HTTP."""
