"""A trained detector as one file that other runtimes run, compared with JAX before it is written."""
