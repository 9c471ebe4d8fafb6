"""Object discovery, probes and the other measurements of a pretrained backbone."""
