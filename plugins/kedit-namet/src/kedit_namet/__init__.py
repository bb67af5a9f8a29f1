"""NAMET for kedit."""
