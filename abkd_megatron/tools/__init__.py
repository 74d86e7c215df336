"""Jobs that do not train a model themselves: check, estimate, compare, report, env."""
