"""Tasks: what only the user knows, which is the data, the metric, the loss, and the code they come from."""
