"""CoRE for kedit."""
