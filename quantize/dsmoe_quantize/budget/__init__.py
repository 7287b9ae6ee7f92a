"""The best types within a budget: sensitivity, what each type costs, the solver, explanations."""
