"""What is known of weights before any array exists: their declarations, names, dtypes and layouts."""
