"""Makes the demo's packaged calibration: which neuron is in which expert, and the routers. Needs torch."""
