"""Jobs that do not train: check, estimate, compare, report, env."""
