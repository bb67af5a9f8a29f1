"""Knowledge neurons for kedit."""
