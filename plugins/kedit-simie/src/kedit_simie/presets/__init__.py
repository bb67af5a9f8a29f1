"""Published and tuned settings, as YAML."""
