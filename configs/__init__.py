"""Configuration: the schema, YAML files, and how they are resolved against a device."""
