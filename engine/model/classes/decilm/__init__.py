"""The files that go beside a checkpoint in the DeciLM layout, as they are."""
