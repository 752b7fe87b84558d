"""mlxd: one warmed mlx-lm engine, served to other people."""

__version__ = "0.1.0"
