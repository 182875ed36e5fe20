"""Opening what the user has: Python, an exported program, a Hugging Face folder."""
