"""User-visible output: console lines and progress bars, tables, and the style of figures."""
