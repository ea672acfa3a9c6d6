"""Checks exports in the runtimes that they are made for."""
