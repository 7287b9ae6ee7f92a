"""dsmoe-local: convert, quantize and run mixtures of experts on a laptop."""

__version__ = "0.1.0"
