"""In-context knowledge editing for kedit."""
