"""Rounding that is calibrated on text: weights are rounded so that the outputs of layers change little."""
