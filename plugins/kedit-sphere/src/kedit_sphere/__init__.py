"""SPHERE for kedit."""
