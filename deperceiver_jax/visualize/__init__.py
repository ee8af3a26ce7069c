"""Pictures for people: python -m deperceiver_jax.visualize."""
