"""One loop for every method: objectives, experience, optimisers, checkpoints, tracking."""
