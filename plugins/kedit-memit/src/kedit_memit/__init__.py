"""MEMIT, EMMET and PMET for kedit."""
