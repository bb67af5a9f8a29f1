"""AlphaEdit for kedit."""
