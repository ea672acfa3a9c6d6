"""Runs replicas as Ray actors. This package does no arithmetic and knows nothing about searches."""
