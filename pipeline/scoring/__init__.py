"""Scoring many images at once with a registered model."""
