"""Texts that a user gives: files, folders and named sets, read as rows."""
