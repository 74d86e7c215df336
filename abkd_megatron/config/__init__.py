"""Configuration: fields and rules, YAML and overrides, and the way to Megatron's arguments."""
