"""EAMET for kedit."""
