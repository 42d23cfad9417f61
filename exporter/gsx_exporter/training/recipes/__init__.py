"""Recipes: settings of `gsx train` as YAML files that people read, copy and edit."""
