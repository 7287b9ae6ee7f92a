"""dsmoe-local: convert, quantize and run DeepSeekMoE models on a laptop."""

__version__ = "0.1.0"
