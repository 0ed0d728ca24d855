"""Fine-tuning with three pillars: scan order, learned masking, hybrid PEFT."""
