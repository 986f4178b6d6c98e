"""The core of a training run, module by module."""
