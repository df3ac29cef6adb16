"""Write, choose and read checkpoints and logs of a run."""
