"""SimIE for kedit."""
