"""`dsmoe bench`: the speed of models, the bytes they read per token, and the memory's bandwidth."""
