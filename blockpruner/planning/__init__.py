"""Estimates the cost of a search before it runs."""
