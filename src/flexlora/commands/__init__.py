"""The commands, by what they are for; `flexlora.cli` puts them together."""
