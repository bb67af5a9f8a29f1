"""Starter facts: what SmolLM2-135M-Instruct knows, and what to tell it instead."""
