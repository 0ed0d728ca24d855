"""Models to be evaluated: of this process, of a server, and as the `lm-eval` harness wants them."""
