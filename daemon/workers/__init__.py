"""The parent's side of child processes: starting them, talking to them, ending them."""
