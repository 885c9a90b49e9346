"""Measures torch_bn against torch's own batch norm and against a plain copy: `python -m benchmarks`."""
