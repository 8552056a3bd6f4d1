"""What the commands share; `data`, `label_maps`, `training` and `evaluation` each have a package."""

__version__ = "0.2.0"
