"""Command lines: arguments, wiring and exit codes; the only place that turns errors into them."""
