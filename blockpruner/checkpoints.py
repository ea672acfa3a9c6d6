"""Import this module to let transformers load pruned checkpoints without `trust_remote_code`."""

import blockpruner.engine.model.classes  # noqa: F401 - registers the classes
