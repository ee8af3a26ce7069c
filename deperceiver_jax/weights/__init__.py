"""Published weights: how PyTorch's files are read, and which of their names are which of our parameters."""
