"""Whole models: configuration and sequence model."""
