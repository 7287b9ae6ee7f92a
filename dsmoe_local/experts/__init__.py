"""What a model's experts did, as figures and pictures. Observing them is the engine's concern."""
