"""The frozen base: how it is loaded, quantized, run without data, and read with a cache."""
