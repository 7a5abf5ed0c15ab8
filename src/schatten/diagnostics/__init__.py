"""Instruments: what the theory says, measured on your own model. One quantity per file; docs/instruments.md has them all."""
