"""Measurements: engines side by side in processes of their own, rows as dataclasses."""
