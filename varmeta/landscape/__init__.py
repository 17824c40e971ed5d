"""One scalar weight, seen whole."""

from varmeta.landscape.landscape import Landscape

__all__ = ["Landscape"]
