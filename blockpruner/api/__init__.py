"""The Python API: the functions that `import blockpruner` offers (docs/python.md).

Models and texts are live objects or names. Nothing is printed unless `verbose=True`. What a caller can get wrong raises
`UserError` with the message that the command line shows; Ctrl-C raises KeyboardInterrupt and leaves a run resumable.
"""
