"""Compares several methods on one model, with the same text and the same evaluation."""
