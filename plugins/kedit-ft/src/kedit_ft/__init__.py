"""Fine-tuning for kedit."""
