"""LoRA, AdaLoRA and QLoRA for kedit."""
