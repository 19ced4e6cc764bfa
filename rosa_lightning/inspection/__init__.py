"""What people look at: parameters, memory, activations, throughput, run curves and the report."""
