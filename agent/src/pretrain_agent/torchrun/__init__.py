"""torchrun: rendezvous backend, launch of ranks, fork server. The only part that imports torch."""
