"""All that a user runs beside training, each as a module: python -m scripts.compare."""
