"""What people see: lines and bars on a console, tables, the style of pictures."""
