"""Handing a trained model to the MLflow model registry."""
