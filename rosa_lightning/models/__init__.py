"""The frozen base: how it is loaded, quantised, and read with a cache."""
