"""Models from GGUF files: exactly the model that was converted, or a refusal that names what cannot be carried over."""
