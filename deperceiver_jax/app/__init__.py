"""A page to try a detector in a browser: pictures in, boxes out, and where each query looked."""
