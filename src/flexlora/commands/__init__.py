"""Groups of commands that `flexlora.cli` puts together."""
