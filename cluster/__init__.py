"""The cluster: replicas as Ray actors. It does no arithmetic, and knows nothing of searches."""
