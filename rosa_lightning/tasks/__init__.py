"""What a benchmark is: its records, its prompt, how answers are read and compared."""
