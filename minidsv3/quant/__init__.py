"""Low-precision numbers: formats and their rounding. Knows no model."""
