"""Lets a model write calibration text."""
