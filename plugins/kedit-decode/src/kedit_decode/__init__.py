"""DoLa and DeCo for kedit."""
