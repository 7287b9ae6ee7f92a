"""What benchmarks/engine.py is made of: contenders, workloads, rows of figures. No part of the package."""
