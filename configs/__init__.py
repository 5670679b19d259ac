"""The configuration of fedsys as YAML: ``config.yaml`` and one folder for each group."""
