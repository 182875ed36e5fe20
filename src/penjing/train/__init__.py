"""Fine-tuning: its settings, its loop, and what plugs into it."""
