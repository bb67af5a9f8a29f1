"""UltraEdit for kedit."""
