"""How a checkpoint comes in and goes out: conversions from and to other layouts."""
