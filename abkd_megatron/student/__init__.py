"""The student's side of a step: hooks, loss head, losses between layers, logged numbers."""
