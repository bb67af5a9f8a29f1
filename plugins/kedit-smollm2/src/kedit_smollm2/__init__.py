"""SmolLM2-135M-Instruct as a model of kedit."""
