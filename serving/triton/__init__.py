"""Under NVIDIA's Triton Inference Server: the model that its python backend runs, and a client for it."""
