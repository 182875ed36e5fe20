"""Opening source networks: Python, an exported program, a Hugging Face folder."""
