"""Launching jobs, on SLURM or on this machine."""
