"""What a model is: architecture, hyper-parameters, tensor layout, cost, and its GGUF file. Runs nothing."""
