"""LightningModules: the whole network, and the reconstruction of one pack."""
