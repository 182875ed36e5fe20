"""What only the user knows: the task, its data, its metric, and the code that it comes from."""
