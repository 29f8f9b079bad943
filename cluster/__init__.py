"""Ray actors, torch.distributed collectives, checkpoints and tracking around the method in `simmatch`."""
