"""big_ssl: self-supervised vision in JAX, every system on one engine."""

__version__ = "0.1.0"
