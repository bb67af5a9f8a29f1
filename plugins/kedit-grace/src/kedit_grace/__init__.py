"""GRACE for kedit."""
