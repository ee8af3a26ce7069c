"""A detector used on pictures of any kind: from Python, and by `deperceiver predict`."""
