"""Methods compared on one base: a plan of runs at equal budgets, their statistics, one report."""
