"""ROME and R-ROME for kedit."""
