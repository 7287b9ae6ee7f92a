"""What a DeepSeekMoE is: hyper-parameters, tensor layout, cost, and its GGUF file. Runs nothing."""
