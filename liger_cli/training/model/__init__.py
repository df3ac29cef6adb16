"""Find, build, load and adapt the model of a run."""
