"""WISE for kedit."""
