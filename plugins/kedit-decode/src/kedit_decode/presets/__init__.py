"""Published settings, as YAML."""
